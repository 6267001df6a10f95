#pragma once

#include <cstdint>

#include "wire/wire_generated.hpp"

namespace vmigrate::transport {

// Over shm no READ and no WRITE is sent. The requester asks once for each key's file and copies by itself:
//
//   target                            source
//     | -- kMap(key) ------------------> |  key must belong to this session
//     | <- kMapReply + descriptor ------ |  descriptor (SCM_RIGHTS) only with status OK; opened read-only for
//     | <------- MESSAGE + bytes ------> |  read-only keys
//
// Both ends run on one machine and are one build, so these frames are not in wire.ts. They share the hello
// and its version with the other providers. Their numbers differ from those of wire::FrameOp.

enum class ShmOp : uint8_t { kMap = 65, kMapReply = 66 };

struct ShmMap {
  uint8_t op;
  uint8_t reserved[15];
  uint64_t key;
  uint8_t reserved_tail[8];
} __attribute__((packed));

struct ShmMapReply {
  uint8_t op;
  uint8_t status;  ///< wire::OpStatus
  uint8_t access;  ///< transport::Access, with status OK
  uint8_t reserved[5];
  uint64_t length;  ///< of the region
  uint64_t key;
  uint64_t offset;  ///< of the region in the file
} __attribute__((packed));

// Has the same size as every other frame, with `key` and `op` at the same place.
static_assert(sizeof(ShmMap) == wire::kFrameHeaderBytes);
static_assert(sizeof(ShmMapReply) == wire::kFrameHeaderBytes);

}  // namespace vmigrate::transport
