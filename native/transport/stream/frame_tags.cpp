#include "transport/stream/frame_tags.hpp"

#include <openssl/crypto.h>

#include <cstring>

namespace vmigrate::transport {

static_assert(Gmac::kTagBytes == wire::kFrameTagBytes);

void FrameTags::begin() {
  uint8_t nonce[Gmac::kNonceBytes] = {};
  std::memcpy(nonce, &frame_count_, sizeof frame_count_);
  ++frame_count_;
  gmac_->begin(nonce);
}

bool FrameTags::finish(std::span<std::byte, wire::kFrameTagBytes> tag) {
  uint8_t made[Gmac::kTagBytes];
  if (!gmac_->finish(made)) return false;
  std::memcpy(tag.data(), made, sizeof made);
  return true;
}

bool FrameTags::matches(std::span<const std::byte, wire::kFrameTagBytes> tag) {
  uint8_t made[Gmac::kTagBytes];
  return gmac_->finish(made) && ::CRYPTO_memcmp(made, tag.data(), sizeof made) == 0;
}

}  // namespace vmigrate::transport
