#pragma once

#include <memory>
#include <span>

#include "base/gmac.hpp"
#include "base/result.hpp"
#include "multicast/datagram/group.hpp"

namespace vmigrate::multicast {

/// Tags of datagrams: AES-256-GMAC, with the sending member and the sequence as nonce. A datagram must begin
/// with a DatagramHeader. One a thread: it allocates when it is created, and not for each datagram.
class DatagramAuth {
 public:
  /// kUnsupported if the library has no AES-GCM.
  static Result<std::unique_ptr<DatagramAuth>> create(const Key& key);

  /// Sets the tag of a datagram that is complete otherwise. False: the library failed.
  bool sign(std::span<std::byte> datagram);
  /// Whether a member of the group has made this very datagram.
  bool verify(std::span<const std::byte> datagram);

 private:
  explicit DatagramAuth(std::unique_ptr<Gmac> gmac) : gmac_(std::move(gmac)) {}
  bool tag_of(std::span<const std::byte> datagram, uint8_t (&tag)[wire::kDatagramTagBytes]);

  const std::unique_ptr<Gmac> gmac_;
};

}  // namespace vmigrate::multicast
