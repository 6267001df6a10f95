#include "memory/digest_map.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <limits>

#include "base/check.hpp"

namespace vmigrate::memory {
namespace {

constexpr size_t kKnownAt = offsetof(wire::DigestsHeader, known_count);
static_assert(sizeof(std::atomic<uint64_t>) == 8 && std::atomic<uint64_t>::is_always_lock_free &&
                  kKnownAt % 8 == 0,
              "a word of the file is used as an atomic");
static_assert(sizeof(wire::DigestsHeader) <= wire::kDigestsHeaderBytes);

uint64_t digests_file_bytes(uint64_t page_count) {
  return wire::kDigestsHeaderBytes + page_count * wire::kDigestBytes;
}

bool digest_count_possible(uint64_t page_count) {
  return page_count != 0 &&
         page_count <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / (2 * wire::kDigestBytes);
}

/// A store through the mapping into a hole of a full file system would end in SIGBUS.
Status allocate_digests(int fd, uint64_t page_count) {
  int rc;
  do {
    rc = ::posix_fallocate(fd, 0, static_cast<off_t>(digests_file_bytes(page_count)));
  } while (rc == EINTR);
  if (rc != 0) return system_error("allocate digests", rc == EFBIG ? ENOSPC : rc);
  return ok();
}

Result<void*> map_digests(int fd, uint64_t page_count) {
  void* mapping = ::mmap(nullptr, digests_file_bytes(page_count), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) return system_error("mmap digests");
  return mapping;
}

}  // namespace

Result<std::unique_ptr<DigestMap>> DigestMap::open_or_create(const std::string& path, uint64_t page_count,
                                                             uint64_t page_bytes) {
  if (!digest_count_possible(page_count)) return Error{ErrorCode::kInvalidArgument, 0, "digests page count"};
  auto map = take_over(path, page_count, page_bytes);
  return map.ok() ? std::move(map) : create(path, page_count, page_bytes);
}

Result<std::unique_ptr<DigestMap>> DigestMap::take_over(const std::string& path, uint64_t page_count,
                                                        uint64_t page_bytes) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd.valid()) return system_error("open digests");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat digests");
  if (!S_ISREG(file.st_mode) || file.st_uid != ::geteuid() ||
      static_cast<uint64_t>(file.st_size) != digests_file_bytes(page_count)) {
    return Error{ErrorCode::kCorrupt, 0, "digests length"};
  }
  if (auto status = allocate_digests(fd.get(), page_count); !status) return status.error();
  auto mapping = map_digests(fd.get(), page_count);
  if (!mapping) return mapping.error();
  std::unique_ptr<DigestMap> map(new DigestMap(std::move(fd), mapping.value(), page_count));
  wire::DigestsHeader header{};
  std::memcpy(&header, mapping.value(), sizeof(header));
  if (header.magic != wire::kDigestsMagic || header.version != wire::kDigestsVersion ||
      header.page_bytes != page_bytes || header.page_count != page_count || header.known_count > page_count) {
    return Error{ErrorCode::kCorrupt, 0, "digests header"};
  }
  return map;
}

Result<std::unique_ptr<DigestMap>> DigestMap::create(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return system_error("unlink old digests");
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return system_error("create digests");
  const auto undo = [&](Error error) {
    ::unlink(path.c_str());
    return error;
  };
  if (auto status = allocate_digests(fd.get(), page_count); !status) return undo(status.error());
  auto mapping = map_digests(fd.get(), page_count);
  if (!mapping) return undo(mapping.error());
  wire::DigestsHeader header{};
  header.magic = wire::kDigestsMagic;
  header.version = wire::kDigestsVersion;
  header.page_bytes = page_bytes;
  header.page_count = page_count;
  std::memcpy(mapping.value(), &header, sizeof(header));
  return std::unique_ptr<DigestMap>(new DigestMap(std::move(fd), mapping.value(), page_count));
}

DigestMap::DigestMap(UniqueFd fd, void* mapping, uint64_t page_count)
    : fd_(std::move(fd)),
      mapping_(static_cast<std::byte*>(mapping)),
      known_(*reinterpret_cast<std::atomic<uint64_t>*>(mapping_ + kKnownAt)),
      page_count_(page_count) {}

DigestMap::~DigestMap() {
  ::munmap(mapping_, digests_file_bytes(page_count_));
}

uint64_t DigestMap::known() const {
  // A18 pairs with R18 in append: the digests are visible to a thread that sees their number.
  return known_.load(std::memory_order_acquire);
}

Digest DigestMap::digest(PageIndex page) const {
  Digest digest;
  const auto bytes = digests({page, 1});
  std::memcpy(digest.data(), bytes.data(), digest.size());
  return digest;
}

std::span<const std::byte> DigestMap::digests(PageRun run) const {
  VMG_CHECK(raw(run.first) <= page_count_ && run.count <= page_count_ - raw(run.first));
  return {mapping_ + wire::kDigestsHeaderBytes + raw(run.first) * wire::kDigestBytes,
          run.count * wire::kDigestBytes};
}

void DigestMap::append(std::span<const std::byte> digests) {
  // Relaxed: only the thread that appends changes it.
  const uint64_t before = known_.load(std::memory_order_relaxed);
  const uint64_t count = digests.size() / wire::kDigestBytes;
  VMG_CHECK(digests.size() % wire::kDigestBytes == 0 && count <= page_count_ - before);
  if (digests.empty()) return;
  std::memcpy(mapping_ + wire::kDigestsHeaderBytes + before * wire::kDigestBytes, digests.data(),
              digests.size());
  // R18 pairs with A18 in known: digests before their number.
  known_.store(before + count, std::memory_order_release);
  // F16 pairs with F15 in PageGate: the number stored before, the states of pages looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

}  // namespace vmigrate::memory
