#include "transport/proof.hpp"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.hpp"

namespace vmigrate::transport {
namespace {

constexpr size_t kHashBytes = 32;

/// Small inputs of known length, one after the other.
struct Bytes {
  std::array<uint8_t, 128> bytes{};
  size_t length = 0;

  Bytes& add(const void* from, size_t length_bytes) {
    VMG_CHECK(length_bytes <= bytes.size() - length);
    std::memcpy(bytes.data() + length, from, length_bytes);
    length += length_bytes;
    return *this;
  }
  Bytes& add(const char* text) { return add(text, std::strlen(text)); }
  Bytes& add(const Transcript& transcript) {
    return add(&transcript.hello, sizeof transcript.hello)
        .add(transcript.source_nonce.data(), transcript.source_nonce.size());
  }
};

bool hmac(std::span<const uint8_t> key, const Bytes& message, uint8_t (&out)[kHashBytes]) {
  unsigned length = 0;
  return ::HMAC(::EVP_sha256(), key.data(), static_cast<int>(key.size()), message.bytes.data(),
                message.length, out, &length) != nullptr &&
         length == kHashBytes;
}

const char* name_of(End end) {
  return end == End::kTarget ? "target" : "source";
}

}  // namespace

bool make_proof(const SessionToken& token, End end, const Transcript& transcript, Proof* proof) {
  uint8_t hash[kHashBytes];
  if (!hmac(token, Bytes().add(name_of(end)).add(transcript), hash)) return false;
  std::copy_n(hash, proof->size(), proof->begin());
  return true;
}

bool derive_key(const SessionToken& token, End sender, const char* purpose, const Transcript& transcript,
                FrameKey* key) {
  static_assert(std::tuple_size_v<FrameKey> == kHashBytes, "one block of HKDF's expansion is the key");
  const Bytes salt = Bytes()
                         .add(transcript.hello.nonce, sizeof transcript.hello.nonce)
                         .add(transcript.source_nonce.data(), transcript.source_nonce.size());
  const uint8_t first_block = 1;
  uint8_t extracted[kHashBytes], expanded[kHashBytes];
  const bool is_derived =
      hmac(std::span(salt.bytes).first(salt.length), Bytes().add(token.data(), token.size()), extracted) &&
      hmac(extracted,
           Bytes().add("vmigrate ").add(purpose).add(" ").add(name_of(sender)).add(&first_block, 1),
           expanded);
  if (is_derived) std::copy_n(expanded, kHashBytes, key->begin());
  explicit_bzero(extracted, sizeof extracted);
  explicit_bzero(expanded, sizeof expanded);
  return is_derived;
}

Nonce random_nonce() {
  Nonce nonce;
  for (;;) {
    const ssize_t count = ::getrandom(nonce.data(), nonce.size(), 0);
    if (count < 0 && errno == EINTR) continue;
    // getrandom returns up to 256 bytes whole once the generator is seeded.
    VMG_CHECK(count == static_cast<ssize_t>(nonce.size()));
    return nonce;
  }
}

}  // namespace vmigrate::transport
