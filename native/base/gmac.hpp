#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "base/result.hpp"

struct evp_cipher_ctx_st;

namespace vmigrate {

/// AES-256-GMAC: authenticates bytes and encrypts none. One thread. Allocates when it is created, and not for
/// each tag. A nonce must not be used twice with one key.
class Gmac {
 public:
  static constexpr size_t kTagBytes = 16;
  static constexpr size_t kNonceBytes = 12;

  /// kUnsupported if the library has no AES-GCM.
  static Result<std::unique_ptr<Gmac>> create(std::span<const uint8_t, 32> key);
  ~Gmac();
  Gmac(const Gmac&) = delete;
  Gmac& operator=(const Gmac&) = delete;

  // A tag is begun, gets any number of bytes, and is finished. A false of `finish` says that the library
  // failed in any of these calls.
  void begin(std::span<const uint8_t, kNonceBytes> nonce);
  void add(std::span<const std::byte> bytes);
  [[nodiscard]] bool finish(uint8_t (&tag)[kTagBytes]);

 private:
  explicit Gmac(evp_cipher_ctx_st* context) : context_(context) {}

  evp_cipher_ctx_st* const context_;
  bool is_failed_ = false;
};

}  // namespace vmigrate
