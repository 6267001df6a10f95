#pragma once

#include <memory>
#include <span>

#include "base/result.hpp"
#include "multicast/datagram/group.hpp"

struct evp_cipher_ctx_st;

namespace vmigrate::multicast {

/// Tags of datagrams: AES-256-GMAC, with the sending member and the sequence as nonce. A datagram must begin
/// with a DatagramHeader. One a thread: it allocates when it is created, and not for each datagram.
class DatagramAuth {
 public:
  /// kUnsupported if the library has no AES-GCM.
  static Result<std::unique_ptr<DatagramAuth>> create(const Key& key);
  ~DatagramAuth();
  DatagramAuth(const DatagramAuth&) = delete;
  DatagramAuth& operator=(const DatagramAuth&) = delete;

  /// Sets the tag of a datagram that is complete otherwise. False: the library failed.
  bool sign(std::span<std::byte> datagram);
  /// Whether a member of the group has made this very datagram.
  bool verify(std::span<const std::byte> datagram);

 private:
  explicit DatagramAuth(evp_cipher_ctx_st* context) : context_(context) {}
  bool tag_of(std::span<const std::byte> datagram, uint8_t (&tag)[wire::kDatagramTagBytes]);

  evp_cipher_ctx_st* const context_;
};

}  // namespace vmigrate::multicast
