#pragma once

#include "base/unique_fd.hpp"
#include "transport/memory_access.hpp"
#include "transport/shm/frames.hpp"

namespace vmigrate::transport {

/// A peer's region: its file and, if useful, our mapping of it. Neither is trusted: the file may shrink, and
/// the descriptor may be anything until open() has checked it.
class ShmRegion {
 public:
  ShmRegion() = default;
  ShmRegion(const ShmRegion&) = delete;
  ShmRegion& operator=(const ShmRegion&) = delete;
  ~ShmRegion() { close(); }

  /// False: the peer's description is wrong (no memory file, shorter than the key, impossible range), a
  /// protocol error.
  bool open(UniqueFd file, const ShmMapReply& reply);
  void close();

  AccessResult read(uint64_t remote_offset_bytes, const MemoryAccess& local, uint64_t local_offset_bytes,
                    uint32_t length_bytes, std::span<std::byte> bounce) const;
  AccessResult write(uint64_t remote_offset_bytes, const MemoryAccess& local, uint64_t local_offset_bytes,
                     uint32_t length_bytes, std::span<std::byte> bounce) const;

 private:
  UniqueFd file_;
  Access access_ = Access::kRead;
  std::byte* mapping_ = nullptr;  ///< of the file, from its start
  size_t mapping_bytes_ = 0;
  MemoryAccess memory_;
};

}  // namespace vmigrate::transport
