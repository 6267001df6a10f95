#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/transport.hpp"
#include "transport/verbs/objects.hpp"

namespace vmigrate::transport {

/// Properties of a device that matter here.
struct DeviceTraits {
  uint32_t queue_entries_max = 0;
  uint8_t reads_as_requester_max = 0;  ///< READs outstanding on one queue pair, as requester
  uint8_t reads_as_responder_max = 0;  ///< the same, as responder
  bool on_demand_paging = false;       ///< for READ and WRITE on reliable connections
  bool iwarp = false;
};
Result<DeviceTraits> query_device(ibv_context* device);

/// The registrations of a region: consecutive chunks, each with its own lkey or rkey.
struct ChunkedKeys {
  uint64_t address = 0;
  uint64_t length_bytes = 0;
  uint64_t chunk_bytes = 0;
  std::vector<uint32_t> keys;

  uint32_t key_at(uint64_t offset_bytes) const { return keys[offset_bytes / chunk_bytes]; }
  uint64_t left_in_chunk(uint64_t offset_bytes) const { return chunk_bytes - offset_bytes % chunk_bytes; }
};

/// A range of our address space that the device may access. Several threads register it in chunks at the same
/// time: registering pins (and, if there is no page yet, allocates and clears) every page, which takes one
/// thread seconds for a big VM. With on-demand paging nothing is pinned. Immutable, so any thread may use it.
class RegisteredMemory {
 public:
  /// kNoSpace: the file system behind `base` has no room for its pages. kOutOfMemory: the limit on locked
  /// memory, or of the memory cgroup, is reached.
  static Result<std::unique_ptr<RegisteredMemory>> create(ibv_pd* pd, std::byte* base, uint64_t length_bytes,
                                                          int access, const DeviceTraits& traits);
  const ChunkedKeys& local() const { return local_; }
  const ChunkedKeys& remote() const { return remote_; }

 private:
  std::vector<MemoryRegion> chunks_;
  ChunkedKeys local_;
  ChunkedKeys remote_;
};

/// The protection domain and registrations that the endpoints of one process share on one device. A region is
/// therefore pinned once, however many connections read into it. Thread-safe.
class RequesterDomain {
 public:
  static Result<std::shared_ptr<RequesterDomain>> of(ibv_context* device);

  ibv_pd* pd() const { return pd_.get(); }
  const DeviceTraits& traits() const { return traits_; }
  /// Lives as long as the last endpoint that asked for it.
  Result<std::shared_ptr<const RegisteredMemory>> register_memory(std::byte* base, uint64_t length_bytes);

 private:
  RequesterDomain(ProtectionDomain pd, const DeviceTraits& traits) : pd_(std::move(pd)), traits_(traits) {}

  const ProtectionDomain pd_;
  const DeviceTraits traits_;
  std::mutex mutex_;
  std::map<std::pair<std::byte*, uint64_t>, std::weak_ptr<const RegisteredMemory>> known_;
};

}  // namespace vmigrate::transport
