#pragma once

#include <cstddef>
#include <cstring>
#include <span>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Copies a header out of a byte buffer, which need not be aligned.
inline wire::FrameHeader decode_header(const std::byte* bytes) {
  wire::FrameHeader header;
  std::memcpy(&header, bytes, sizeof header);
  return header;
}

inline wire::FrameHeader message_header(size_t length_bytes) {
  wire::FrameHeader header{};
  header.op = static_cast<uint8_t>(wire::FrameOp::kMessage);
  header.length = static_cast<uint32_t>(length_bytes);
  return header;
}

/// A MESSAGE has a length and no other field.
inline bool valid_message_header(const wire::FrameHeader& header) {
  return header.length != 0 && header.length <= wire::kMessageBytesMax && header.status == 0 &&
         header.reserved == 0 && header.tag == 0 && header.key == 0 && header.offset == 0;
}

/// Converts the status that the peer reports for an operation into the requester's result. False: there is no
/// such status. Only a READ can be answered with kAbsent.
inline bool result_of(uint8_t status, OpResult* result) {
  switch (static_cast<wire::OpStatus>(status)) {
    case wire::OpStatus::kOk:
      *result = OpResult::kOk;
      return true;
    case wire::OpStatus::kBadKey:
      *result = OpResult::kBadKey;
      return true;
    case wire::OpStatus::kOutOfRange:
      *result = OpResult::kOutOfRange;
      return true;
    case wire::OpStatus::kNotAllowed:
      *result = OpResult::kNotAllowed;
      return true;
    case wire::OpStatus::kIoError:
      *result = OpResult::kIoError;
      return true;
    case wire::OpStatus::kAbsent:
      *result = OpResult::kAbsent;
      return true;
  }
  return false;
}

/// Converts a result into the status for the requester. No space on our side is an I/O error on its side.
inline wire::OpStatus status_of(OpResult result) {
  switch (result) {
    case OpResult::kOk:
      return wire::OpStatus::kOk;
    case OpResult::kBadKey:
      return wire::OpStatus::kBadKey;
    case OpResult::kOutOfRange:
      return wire::OpStatus::kOutOfRange;
    case OpResult::kNotAllowed:
      return wire::OpStatus::kNotAllowed;
    case OpResult::kAbsent:
      return wire::OpStatus::kAbsent;
    default:
      return wire::OpStatus::kIoError;
  }
}

}  // namespace vmigrate::transport
