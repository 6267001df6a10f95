#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "transport/frames.hpp"

namespace vmigrate::transport {

// Over verbs the device moves bytes one-sided. Frames carry messages, and once for each key the values that
// the requester's device needs:
//
//   target                               source
//     | -- kMap(key) ---------------------> |  key must belong to this session
//     | <- kMapReply + rkeys -------------- |  where the region lies, and one rkey a chunk
//     | == RDMA READ / WRITE =============> |  the device answers; no thread of the source takes part
//     | <--------- MESSAGE + bytes -------> |
//
// One frame is one SEND. The indirection has three purposes. It puts a key of 64 random bits in front of
// rkeys, which can be guessed. It allows many registrations per region. It turns an operation on a wrong key
// or range into a result instead of the end of the queue pair. The device enforces the same rights again:
// each session's rkeys live in a protection domain of their own.
//
// Both ends speak the version in the hello. The numbers differ from those of wire::FrameOp.

enum class VerbsOp : uint8_t { kMap = 97, kMapReply = 98 };

/// Maximum number of registrations of one region: this many rkeys fit into a message.
inline constexpr size_t kChunksMax = 1000;

struct VerbsMap {
  uint8_t op;
  uint8_t reserved[15];
  uint64_t key;
  uint8_t reserved_tail[8];
} __attribute__((packed));

struct VerbsMapReply {
  uint8_t op;
  uint8_t status;  ///< wire::OpStatus; if not OK, the fields below `key` are zero and no rkey follows
  uint8_t access;  ///< transport::Access
  uint8_t reserved;
  uint32_t chunk_count;
  uint64_t length;
  uint64_t key;
  uint64_t chunk_bytes;
  uint64_t address;  ///< of the region in the source's address space
                     ///< chunk_count rkeys of 32 bits follow.
} __attribute__((packed));

// `op` and `key` are at the same place as in every other frame.
static_assert(sizeof(VerbsMap) == wire::kFrameHeaderBytes);
static_assert(sizeof(VerbsMapReply) == wire::kFrameHeaderBytes + 8);
static_assert(offsetof(VerbsMap, key) == offsetof(wire::FrameHeader, key));
static_assert(sizeof(VerbsMapReply) + kChunksMax * sizeof(uint32_t) <=
              wire::kFrameHeaderBytes + wire::kMessageBytesMax);

enum class VerbsFrame : uint8_t { kWrong = 0, kMessage, kMap, kMapReply };

/// What a frame is, by its head and its length. What a map frame says is still to be checked, and so is the
/// length of a reply.
inline VerbsFrame kind_of(std::span<const std::byte> frame) {
  if (frame.size() < sizeof(wire::FrameHeader)) return VerbsFrame::kWrong;
  const wire::FrameHeader header = decode_header(frame.data());
  if (header.op == static_cast<uint8_t>(wire::FrameOp::kMessage))
    return valid_message_header(header) && frame.size() == sizeof header + header.length
               ? VerbsFrame::kMessage
               : VerbsFrame::kWrong;
  if (header.op == static_cast<uint8_t>(VerbsOp::kMap))
    return frame.size() == sizeof(VerbsMap) ? VerbsFrame::kMap : VerbsFrame::kWrong;
  return header.op == static_cast<uint8_t>(VerbsOp::kMapReply) ? VerbsFrame::kMapReply : VerbsFrame::kWrong;
}

/// Of a frame that is kMessage.
inline std::span<const std::byte> message_in(std::span<const std::byte> frame) {
  return frame.subspan(sizeof(wire::FrameHeader));
}

/// The private data of an event of the connection manager: of any length, and nullptr if there is none.
inline std::span<const std::byte> private_data(const void* data, size_t length_bytes) {
  return {static_cast<const std::byte*>(data), data != nullptr ? length_bytes : 0};
}

/// The hello in the private data of a request; zeros if it is shorter than one. The fabric may append zeros.
inline wire::Hello hello_in(std::span<const std::byte> data) {
  wire::Hello hello{};
  if (data.size() >= sizeof hello) std::memcpy(&hello, data.data(), sizeof hello);
  return hello;
}

/// The reply in the private data of an answer, of which an older peer sends only the head. nullopt: there is
/// none. Rejections by the fabric itself carry none, or zeros.
inline std::optional<wire::HelloReply> reply_in(std::span<const std::byte> data) {
  wire::HelloReply reply{};
  if (data.size() < wire::kHelloReplyHeadBytes) return std::nullopt;
  std::memcpy(&reply, data.data(), std::min(sizeof reply, data.size()));
  if (reply.magic != wire::kHelloMagic) return std::nullopt;
  return reply;
}

}  // namespace vmigrate::transport
