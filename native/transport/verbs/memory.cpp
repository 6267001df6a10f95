#include "transport/verbs/memory.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

#include "transport/verbs/frames.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kChunkBytes = 64 << 20;
constexpr unsigned kRegisteringThreadsMax = 8;

static_assert(kChunkBytes >= wire::kTransferBytesMax, "an operation touches two chunks at most");

// The number of chunks is limited so that their keys fit into a message; each is a multiple of kChunkBytes.
uint64_t chunk_bytes_for(uint64_t length_bytes) {
  const uint64_t units = (length_bytes + kChunkBytes - 1) / kChunkBytes;
  return kChunkBytes * ((units + kChunksMax - 1) / kChunksMax);
}

Error registration_error(int error) {
  // The kernel cannot allocate the page: the file system is full, or the file has been cut.
  if (error == EFAULT) return Error{ErrorCode::kNoSpace, error, "register memory: no page behind it"};
  if (error == ENOMEM)
    return Error{ErrorCode::kOutOfMemory, error,
                 "register memory: over the limit of locked memory (memlock), or out of memory"};
  return system_error("register memory", error);
}

uint8_t clamp_depth(int depth) {
  // 255 means "as much as there is" to librdmacm, so it is never passed as a number.
  return static_cast<uint8_t>(std::clamp(depth, 1, 128));
}

}  // namespace

Result<DeviceTraits> query_device(ibv_context* device) {
  DeviceTraits traits;
  traits.iwarp = device->device->transport_type == IBV_TRANSPORT_IWARP;
  ibv_device_attr_ex extended{};
  ibv_device_attr& plain = extended.orig_attr;
  const verbs_context* operations = verbs_get_ctx_op(device, query_device_ex);
  if (operations != nullptr &&
      operations->query_device_ex(device, nullptr, &extended, sizeof extended) == 0) {
    constexpr uint32_t kNeeded = IBV_ODP_SUPPORT_SEND | IBV_ODP_SUPPORT_READ | IBV_ODP_SUPPORT_WRITE;
    traits.on_demand_paging = (extended.odp_caps.general_caps & IBV_ODP_SUPPORT) != 0 &&
                              (extended.odp_caps.per_transport_caps.rc_odp_caps & kNeeded) == kNeeded;
  } else if (const int error = verbs().ibv.query_device(device, &plain); error != 0) {
    return system_error("query RDMA device", error);
  }
  traits.queue_entries_max = static_cast<uint32_t>(std::max(0, std::min(plain.max_qp_wr, plain.max_cqe)));
  traits.reads_as_requester_max = clamp_depth(plain.max_qp_init_rd_atom);
  traits.reads_as_responder_max = clamp_depth(plain.max_qp_rd_atom);
  return traits;
}

Result<std::unique_ptr<RegisteredMemory>> RegisteredMemory::create(ibv_pd* pd, std::byte* base,
                                                                   uint64_t length_bytes, int access,
                                                                   const DeviceTraits& traits) {
  if (base == nullptr || length_bytes == 0)
    return Error{ErrorCode::kInvalidArgument, 0, "RDMA needs memory that is mapped"};
  auto memory = std::make_unique<RegisteredMemory>();
  const uint64_t chunk_bytes = chunk_bytes_for(length_bytes);
  const size_t chunk_count = (length_bytes + chunk_bytes - 1) / chunk_bytes;
  memory->chunks_.resize(chunk_count);
  if (traits.on_demand_paging) access |= IBV_ACCESS_ON_DEMAND;

  std::atomic<size_t> next{0};
  std::atomic<int> failure{0};
  const auto register_chunks = [&] {
    for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < chunk_count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      if (failure.load(std::memory_order_relaxed) != 0) return;
      const uint64_t offset = i * chunk_bytes;
      ibv_mr* chunk =
          verbs().ibv.reg_mr(pd, base + offset, std::min(chunk_bytes, length_bytes - offset), access);
      if (chunk == nullptr) return failure.store(errno != 0 ? errno : EIO, std::memory_order_relaxed);
      memory->chunks_[i].reset(chunk);
    }
  };
  {
    // join orders: after it this thread sees what the other threads have written.
    std::vector<std::jthread> helpers;
    const auto wanted =
        std::min<size_t>({chunk_count, std::thread::hardware_concurrency(), kRegisteringThreadsMax});
    try {
      while (helpers.size() + 1 < wanted) helpers.emplace_back(register_chunks);
    } catch (const std::system_error&) {
      // Fewer threads do the same work, only slower.
    }
    register_chunks();
  }
  if (const int error = failure.load(std::memory_order_relaxed); error != 0) return registration_error(error);

  ChunkedKeys keys{reinterpret_cast<uintptr_t>(base), length_bytes, chunk_bytes,
                   std::vector<uint32_t>(chunk_count)};
  memory->local_ = keys;
  memory->remote_ = std::move(keys);
  for (size_t i = 0; i < chunk_count; ++i) {
    memory->local_.keys[i] = memory->chunks_[i]->lkey;
    memory->remote_.keys[i] = memory->chunks_[i]->rkey;
  }
  return memory;
}

Result<std::shared_ptr<RequesterDomain>> RequesterDomain::of(ibv_context* device) {
  static std::mutex mutex;
  static std::map<ibv_context*, std::weak_ptr<RequesterDomain>> domains;
  const std::lock_guard lock(mutex);
  if (auto known = domains[device].lock()) return known;
  auto traits = query_device(device);
  if (!traits) return traits.error();
  ProtectionDomain pd(verbs().ibv.alloc_pd(device));
  if (pd == nullptr) return system_error("allocate protection domain");
  std::shared_ptr<RequesterDomain> domain(new RequesterDomain(std::move(pd), traits.value()));
  domains[device] = domain;
  return domain;
}

Result<std::shared_ptr<const RegisteredMemory>> RequesterDomain::register_memory(std::byte* base,
                                                                                 uint64_t length_bytes) {
  const std::lock_guard lock(mutex_);
  std::erase_if(known_, [](const auto& entry) { return entry.second.expired(); });
  auto& entry = known_[{base, length_bytes}];
  if (auto known = entry.lock()) return known;
  int access = IBV_ACCESS_LOCAL_WRITE;
  // On iWARP the answer to a READ is a WRITE of the peer into our memory.
  if (traits_.iwarp) access |= IBV_ACCESS_REMOTE_WRITE;
  auto memory = RegisteredMemory::create(pd_.get(), base, length_bytes, access, traits_);
  if (!memory) return memory.error();
  std::shared_ptr<const RegisteredMemory> shared(std::move(memory).value());
  entry = shared;
  return shared;
}

}  // namespace vmigrate::transport
