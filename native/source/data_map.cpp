#include "source/data_map.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "base/check.hpp"

namespace vmigrate::pager {

/// A map of a small region is padded, so that a READ of a whole map fills several of any network's frames:
/// the target tries its connections with it (fetch/probe.hpp).
constexpr uint64_t kLengthBytesMin = 64 << 10;

static_assert(std::endian::native == std::endian::little, "the map is little-endian on the wire");
static_assert(sizeof(wire::DataMapHeader) == wire::kDataMapHeaderBytes);

Result<std::unique_ptr<DataMap>> DataMap::create(uint64_t page_count, Kind kind) {
  std::unique_ptr<DataMap> map(new DataMap());
  map->page_count_ = page_count;
  map->length_bytes_ = std::max(wire::kDataMapHeaderBytes + (page_count + 7) / 8, kLengthBytesMin);
  const UniqueFd fd(::memfd_create("vmigrate-data-map", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return system_error("memfd_create data map");
  if (::ftruncate(fd.get(), static_cast<off_t>(map->length_bytes_)) != 0)
    return system_error("ftruncate data map");
  // Nobody can shrink the file under a reader.
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) return system_error("seal data map");
  void* base = ::mmap(nullptr, map->length_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) return system_error("mmap data map");
  map->base_ = static_cast<std::byte*>(base);
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd.get());
  map->read_fd_.reset(::open(path, O_RDONLY | O_CLOEXEC));
  if (!map->read_fd_.valid()) return system_error("open data map for reading");
  void* read_base = ::mmap(nullptr, map->length_bytes_, PROT_READ, MAP_SHARED, map->read_fd_.get(), 0);
  if (read_base == MAP_FAILED) return system_error("mmap data map for reading");
  map->read_base_ = static_cast<std::byte*>(read_base);
  wire::DataMapHeader header{};
  header.magic = kind == Kind::kData ? wire::kDataMapMagic : wire::kDirtyMapMagic;
  header.page_count = page_count;
  std::memcpy(map->base_, &header, sizeof(header));
  return map;
}

DataMap::~DataMap() {
  if (base_ != nullptr) ::munmap(base_, length_bytes_);
  if (read_base_ != nullptr) ::munmap(read_base_, length_bytes_);
}

void DataMap::begin() {
  auto* ready = reinterpret_cast<uint32_t*>(base_ + offsetof(wire::DataMapHeader, ready));
  std::atomic_ref<uint32_t>(*ready).store(0, std::memory_order_relaxed);
  std::memset(base_ + wire::kDataMapHeaderBytes, 0, (page_count_ + 7) / 8);
}

bool DataMap::has_all(PageRun run) const {
  VMG_CHECK(raw(run.first) <= page_count_ && run.count <= page_count_ - raw(run.first));
  const auto* bits = reinterpret_cast<const uint8_t*>(base_ + wire::kDataMapHeaderBytes);
  for (uint64_t page = raw(run.first); page < raw(run.first) + run.count; ++page)
    if ((bits[page / 8] >> page % 8 & 1) == 0) return false;
  return true;
}

std::span<const std::byte> DataMap::bits() const {
  return {base_ + wire::kDataMapHeaderBytes, (page_count_ + 7) / 8};
}

uint64_t DataMap::count() const {
  const auto* bits = reinterpret_cast<const uint8_t*>(base_ + wire::kDataMapHeaderBytes);
  uint64_t count = 0;
  for (uint64_t i = 0; i < (page_count_ + 7) / 8; ++i) count += static_cast<uint64_t>(std::popcount(bits[i]));
  return count;
}

void DataMap::set(PageRun run) {
  VMG_CHECK(raw(run.first) <= page_count_ && run.count <= page_count_ - raw(run.first));
  auto* bits = reinterpret_cast<uint8_t*>(base_ + wire::kDataMapHeaderBytes);
  uint64_t page = raw(run.first);
  const uint64_t end = page + run.count;
  while (page < end && page % 8 != 0) {
    bits[page / 8] = static_cast<uint8_t>(bits[page / 8] | 1u << page % 8);
    ++page;
  }
  std::memset(bits + page / 8, 0xff, (end - page) / 8);
  page += (end - page) / 8 * 8;
  for (; page < end; ++page) bits[page / 8] = static_cast<uint8_t>(bits[page / 8] | 1u << page % 8);
}

void DataMap::finish(uint64_t page_count, uint32_t ready_value) {
  std::memcpy(base_ + offsetof(wire::DataMapHeader, data_page_count), &page_count, sizeof(page_count));
  auto* ready = reinterpret_cast<uint32_t*>(base_ + offsetof(wire::DataMapHeader, ready));
  // R9 pairs with the target's second READ (DataMapReader): bits and count before ready. The target reads the
  // bits only after a READ that has shown it ready.
  std::atomic_ref<uint32_t>(*ready).store(ready_value, std::memory_order_release);
}

transport::LocalMemory DataMap::readable() const {
  return {.base = read_base_, .fd = read_fd_.get(), .fd_offset_bytes = 0, .length_bytes = length_bytes_};
}

transport::LocalMemory DataMap::pinnable() const {
  return {.base = base_, .fd = read_fd_.get(), .fd_offset_bytes = 0, .length_bytes = length_bytes_};
}

}  // namespace vmigrate::pager
