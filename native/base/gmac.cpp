#include "base/gmac.hpp"

#include <openssl/evp.h>

namespace vmigrate {

Result<std::unique_ptr<Gmac>> Gmac::create(std::span<const uint8_t, 32> key) {
  EVP_CIPHER_CTX* context = ::EVP_CIPHER_CTX_new();
  if (context == nullptr) return Error{ErrorCode::kOutOfMemory, 0, "AES-GCM"};
  std::unique_ptr<Gmac> gmac(new Gmac(context));
  // The key schedule is made once; each tag only brings its nonce.
  if (::EVP_EncryptInit_ex(context, ::EVP_aes_256_gcm(), nullptr, key.data(), nullptr) != 1)
    return Error{ErrorCode::kUnsupported, 0, "libcrypto has no AES-GCM"};
  return gmac;
}

Gmac::~Gmac() {
  ::EVP_CIPHER_CTX_free(context_);
}

void Gmac::begin(std::span<const uint8_t, kNonceBytes> nonce) {
  is_failed_ = ::EVP_EncryptInit_ex(context_, nullptr, nullptr, nullptr, nonce.data()) != 1;
}

void Gmac::add(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  int done = 0;
  is_failed_ |= ::EVP_EncryptUpdate(context_, nullptr, &done, reinterpret_cast<const uint8_t*>(bytes.data()),
                                    static_cast<int>(bytes.size())) != 1;
}

bool Gmac::finish(uint8_t (&tag)[kTagBytes]) {
  int done = 0;
  uint8_t nothing[1];
  return !is_failed_ && ::EVP_EncryptFinal_ex(context_, nothing, &done) == 1 &&
         ::EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_GET_TAG, static_cast<int>(kTagBytes), tag) == 1;
}

}  // namespace vmigrate
