#include "multicast/datagram/auth.hpp"

#include <openssl/crypto.h>
#include <openssl/evp.h>

#include <cstring>

#include "base/check.hpp"
#include "multicast/datagram/header.hpp"

namespace vmigrate::multicast {
namespace {

constexpr size_t kNonceBytes = 12;

}  // namespace

Result<std::unique_ptr<DatagramAuth>> DatagramAuth::create(const Key& key) {
  EVP_CIPHER_CTX* context = ::EVP_CIPHER_CTX_new();
  if (context == nullptr) return Error{ErrorCode::kOutOfMemory, 0, "AES-GCM"};
  std::unique_ptr<DatagramAuth> auth(new DatagramAuth(context));
  // The key schedule is made once; each datagram only brings its nonce.
  if (::EVP_EncryptInit_ex(context, ::EVP_aes_256_gcm(), nullptr, key.data(), nullptr) != 1)
    return Error{ErrorCode::kUnsupported, 0, "libcrypto has no AES-GCM"};
  return auth;
}

DatagramAuth::~DatagramAuth() {
  ::EVP_CIPHER_CTX_free(context_);
}

/// Everything but the tag itself is authenticated, and nothing is encrypted.
bool DatagramAuth::tag_of(std::span<const std::byte> datagram, uint8_t (&tag)[wire::kDatagramTagBytes]) {
  VMG_CHECK(datagram.size() >= sizeof(DatagramHeader));
  DatagramHeader header;
  std::memcpy(&header, datagram.data(), sizeof(header));
  const uint32_t member = header.member;
  const uint64_t sequence = header.sequence;
  uint8_t nonce[kNonceBytes];
  std::memcpy(nonce, &member, sizeof(member));
  std::memcpy(nonce + sizeof(member), &sequence, sizeof(sequence));
  const auto* bytes = reinterpret_cast<const uint8_t*>(datagram.data());
  const auto add = [&](const uint8_t* from, size_t length_bytes) {
    int done = 0;
    return length_bytes == 0 ||
           ::EVP_EncryptUpdate(context_, nullptr, &done, from, static_cast<int>(length_bytes)) == 1;
  };
  int done = 0;
  uint8_t nothing[1];
  return ::EVP_EncryptInit_ex(context_, nullptr, nullptr, nullptr, nonce) == 1 &&
         add(bytes, offsetof(DatagramHeader, tag)) &&
         add(bytes + sizeof(header), datagram.size() - sizeof(header)) &&
         ::EVP_EncryptFinal_ex(context_, nothing, &done) == 1 &&
         ::EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_GET_TAG, sizeof(tag), tag) == 1;
}

bool DatagramAuth::sign(std::span<std::byte> datagram) {
  uint8_t tag[wire::kDatagramTagBytes];
  if (!tag_of(datagram, tag)) return false;
  std::memcpy(datagram.data() + offsetof(DatagramHeader, tag), tag, sizeof(tag));
  return true;
}

bool DatagramAuth::verify(std::span<const std::byte> datagram) {
  uint8_t tag[wire::kDatagramTagBytes];
  return tag_of(datagram, tag) &&
         ::CRYPTO_memcmp(tag, datagram.data() + offsetof(DatagramHeader, tag), sizeof(tag)) == 0;
}

}  // namespace vmigrate::multicast
