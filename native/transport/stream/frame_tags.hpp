#pragma once

#include <memory>

#include "base/gmac.hpp"
#include "transport/proof.hpp"

namespace vmigrate::transport {

/// The tags of the frames that one end of a connection sends, made there and checked at the other end. The
/// nonce is the number of the frame, so a frame that was altered, repeated, moved or left out spoils the tag.
/// The caller takes frames in the order of the stream. One thread. Allocates only when it is created.
class FrameTags {
 public:
  static Result<std::unique_ptr<FrameTags>> create(const FrameKey& key) {
    auto gmac = Gmac::create(key);
    if (!gmac) return gmac.error();
    return std::unique_ptr<FrameTags>(new FrameTags(std::move(gmac).value()));
  }

  void begin();
  void add(std::span<const std::byte> bytes) { gmac_->add(bytes); }
  /// Writes the frame's tag. False: libcrypto failed, and the connection must end.
  [[nodiscard]] bool finish(std::span<std::byte, wire::kFrameTagBytes> tag);
  /// Whether this is the frame's tag. False: the connection must end.
  [[nodiscard]] bool matches(std::span<const std::byte, wire::kFrameTagBytes> tag);

 private:
  explicit FrameTags(std::unique_ptr<Gmac> gmac) : gmac_(std::move(gmac)) {}

  const std::unique_ptr<Gmac> gmac_;
  uint64_t frame_count_ = 0;
};

/// Both directions of a connection; null without integrity.
struct ConnectionTags {
  std::unique_ptr<FrameTags> sent;
  std::unique_ptr<FrameTags> received;

  /// How many bytes of tag follow each frame.
  size_t tag_bytes() const { return sent != nullptr ? wire::kFrameTagBytes : 0; }
  static Result<ConnectionTags> create(Security security, const FrameKey& sent, const FrameKey& received) {
    ConnectionTags tags;
    if (security != Security::kIntegrity) return tags;
    auto sending = FrameTags::create(sent);
    auto receiving = FrameTags::create(received);
    if (!sending || !receiving) return sending ? receiving.error() : sending.error();
    tags.sent = std::move(sending).value();
    tags.received = std::move(receiving).value();
    return tags;
  }
};

}  // namespace vmigrate::transport
