#pragma once

#include <cstring>
#include <span>

#include "multicast/datagram/auth.hpp"
#include "multicast/datagram/header.hpp"

namespace vmigrate::multicast {

/// Makes the datagrams of one member. Each gets a sequence of its own, so that no nonce is used twice. One
/// thread.
class DatagramWriter {
 public:
  /// `first_sequence` must be above all that this member has used with this key.
  DatagramWriter(DatagramAuth& auth, uint64_t session, uint16_t member, uint64_t first_sequence)
      : auth_(auth), session_(session), member_(member), next_sequence_(first_sequence) {}

  uint64_t next_sequence() const { return next_sequence_; }
  /// Completes a datagram whose payload is in its place behind the header. False: the library failed.
  bool finish(std::span<std::byte> datagram, DatagramKind kind, uint16_t region = 0, uint64_t offset = 0) {
    DatagramHeader header{};
    header.magic = wire::kDatagramMagic;
    header.kind = static_cast<uint8_t>(kind);
    header.region = region;
    header.length = static_cast<uint16_t>(datagram.size() - sizeof(header));
    header.member = member_;
    header.session = session_;
    header.sequence = next_sequence_++;
    header.offset = offset;
    std::memcpy(datagram.data(), &header, sizeof(header));
    return auth_.sign(datagram);
  }
  /// Writes a datagram whose payload is one record into `out`, and returns it; empty if the library failed.
  template <typename Record>
  std::span<const std::byte> write(std::span<std::byte> out, DatagramKind kind, const Record& record) {
    const auto datagram = out.first(sizeof(DatagramHeader) + sizeof(Record));
    std::memcpy(datagram.data() + sizeof(DatagramHeader), &record, sizeof(Record));
    return finish(datagram, kind) ? datagram : std::span<std::byte>();
  }

 private:
  DatagramAuth& auth_;
  const uint64_t session_;
  const uint16_t member_;
  uint64_t next_sequence_;
};

}  // namespace vmigrate::multicast
