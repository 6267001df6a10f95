#pragma once

#include <cstring>
#include <optional>
#include <span>

#include "wire/wire_generated.hpp"

namespace vmigrate::multicast {

using wire::DatagramHeader;
using wire::DatagramKind;

inline constexpr uint16_t kSenderMember = 0;
/// The largest payload that a header can announce in whole grains.
inline constexpr size_t kPayloadBytesMax = 0xffff / wire::kDatagramGrainBytes * wire::kDatagramGrainBytes;

static_assert(sizeof(DatagramHeader) == wire::kDatagramHeaderBytes);
static_assert(offsetof(DatagramHeader, tag) + wire::kDatagramTagBytes == sizeof(DatagramHeader));

/// The header of a datagram, if it has one of ours and is exactly as long as it says. What it says is still
/// to be authenticated.
inline std::optional<DatagramHeader> parse_header(std::span<const std::byte> datagram) {
  if (datagram.size() < sizeof(DatagramHeader)) return std::nullopt;
  DatagramHeader header;
  std::memcpy(&header, datagram.data(), sizeof(header));
  if (header.magic != wire::kDatagramMagic || datagram.size() != sizeof(header) + header.length)
    return std::nullopt;
  return header;
}

inline std::span<const std::byte> payload_of(std::span<const std::byte> datagram) {
  return datagram.subspan(sizeof(DatagramHeader));
}

/// A payload that is exactly one record.
template <typename Record>
std::optional<Record> parse_record(std::span<const std::byte> datagram) {
  if (datagram.size() != sizeof(DatagramHeader) + sizeof(Record)) return std::nullopt;
  Record record;
  std::memcpy(&record, payload_of(datagram).data(), sizeof(record));
  return record;
}

}  // namespace vmigrate::multicast
