#include "memory/presence_map.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <limits>

#include "base/check.hpp"

namespace vmigrate::memory {
namespace {

static_assert(sizeof(std::atomic<uint8_t>) == 1 && std::atomic<uint8_t>::is_always_lock_free,
              "the file's bytes are used as atomics");
static_assert(sizeof(wire::PresenceHeader) <= wire::kPresenceHeaderBytes);

constexpr uint8_t raw(PageState state) {
  return static_cast<uint8_t>(state);
}

bool page_count_possible(uint64_t page_count) {
  return page_count != 0 && page_count <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / 2;
}

uint64_t file_bytes(uint64_t page_count) {
  return wire::kPresenceHeaderBytes + page_count;
}

Result<void*> map_file(int fd, uint64_t page_count) {
  void* mapping = ::mmap(nullptr, file_bytes(page_count), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) return system_error("mmap presence map");
  return mapping;
}

}  // namespace

Result<std::unique_ptr<PresenceMap>> PresenceMap::create(const std::string& path, uint64_t page_count,
                                                         uint64_t page_bytes) {
  if (!page_count_possible(page_count)) {
    return Error{ErrorCode::kInvalidArgument, 0, "presence map page count"};
  }
  // A map of a finished session may exist. The new map gets another inode, so that a process which still has
  // the old one mapped sees no change.
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return system_error("unlink old presence map");
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return system_error("create presence map");
  const auto undo = [&](Error error) {
    ::unlink(path.c_str());
    return error;
  };
  // Allocates the file instead of leaving it sparse: a store through the mapping into a hole of a full file
  // system would end in SIGBUS.
  int rc;
  do {
    rc = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(file_bytes(page_count)));
  } while (rc == EINTR);
  if (rc != 0) return undo(system_error("allocate presence map", rc == EFBIG ? ENOSPC : rc));
  auto mapping = map_file(fd.get(), page_count);
  if (!mapping) return undo(mapping.error());
  wire::PresenceHeader header{};
  header.magic = wire::kPresenceMagic;
  header.version = wire::kPresenceVersion;
  header.page_bytes = page_bytes;
  header.page_count = page_count;
  std::memcpy(mapping.value(), &header, sizeof(header));
  return std::unique_ptr<PresenceMap>(new PresenceMap(std::move(fd), mapping.value(), page_count));
}

Result<std::unique_ptr<PresenceMap>> PresenceMap::reopen(const std::string& path, uint64_t page_count,
                                                         uint64_t page_bytes,
                                                         const std::function<Status(PageRun)>& wipe) {
  if (!page_count_possible(page_count)) {
    return Error{ErrorCode::kInvalidArgument, 0, "presence map page count"};
  }
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd.valid()) return system_error("open presence map");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat presence map");
  if (!S_ISREG(file.st_mode) || static_cast<uint64_t>(file.st_size) != file_bytes(page_count)) {
    return Error{ErrorCode::kCorrupt, 0, "presence map length"};
  }
  auto mapping = map_file(fd.get(), page_count);
  if (!mapping) return mapping.error();
  std::unique_ptr<PresenceMap> map(new PresenceMap(std::move(fd), mapping.value(), page_count));
  wire::PresenceHeader header{};
  std::memcpy(&header, mapping.value(), sizeof(header));
  if (header.magic != wire::kPresenceMagic || header.version != wire::kPresenceVersion ||
      header.page_bytes != page_bytes || header.page_count != page_count) {
    return Error{ErrorCode::kCorrupt, 0, "presence map header"};
  }
  // Relaxed: no other thread has this map yet.
  const auto state_of = [&](uint64_t page) { return map->states_[page].load(std::memory_order_relaxed); };
  for (uint64_t page = 0; page < page_count; ++page)
    if (state_of(page) > raw(PageState::kZero)) return Error{ErrorCode::kCorrupt, 0, "presence map state"};
  for (uint64_t page = 0; page < page_count; ++page) {
    uint64_t end = page;
    while (end < page_count && state_of(end) == raw(PageState::kClaimed)) ++end;
    if (end == page) continue;
    if (Status wiped = wipe({PageIndex{page}, end - page}); !wiped) return wiped.error();
    for (; page < end; ++page) map->states_[page].store(raw(PageState::kAbsent), std::memory_order_relaxed);
  }
  return map;
}

PresenceMap::PresenceMap(UniqueFd fd, void* mapping, uint64_t page_count)
    : fd_(std::move(fd)),
      mapping_(mapping),
      states_(reinterpret_cast<std::atomic<uint8_t>*>(static_cast<uint8_t*>(mapping) +
                                                      wire::kPresenceHeaderBytes)),
      page_count_(page_count) {}

PresenceMap::~PresenceMap() {
  ::munmap(mapping_, file_bytes(page_count_));
}

PageState PresenceMap::state(PageIndex page) const {
  VMG_CHECK(vmigrate::raw(page) < page_count_);
  // A1 pairs with R1 in publish: the page's bytes are visible to a thread that sees kPresent.
  return static_cast<PageState>(states_[vmigrate::raw(page)].load(std::memory_order_acquire));
}

bool PresenceMap::claim(PageIndex page) {
  VMG_CHECK(vmigrate::raw(page) < page_count_);
  uint8_t expected = raw(PageState::kAbsent);
  // A20 pairs with R20 in unclaim: what the last claimer has done to the bytes comes before what this one
  // does.
  return states_[vmigrate::raw(page)].compare_exchange_strong(
      expected, raw(PageState::kClaimed), std::memory_order_acquire, std::memory_order_relaxed);
}

uint64_t PresenceMap::claim_run(PageIndex first, uint64_t count_max) {
  uint64_t count = 0;
  while (count < count_max && vmigrate::raw(first) + count < page_count_ &&
         claim(PageIndex{vmigrate::raw(first) + count})) {
    ++count;
  }
  return count;
}

void PresenceMap::publish(PageRun run) {
  VMG_CHECK(vmigrate::raw(run.first) <= page_count_ && run.count <= page_count_ - vmigrate::raw(run.first));
  for (uint64_t page = vmigrate::raw(run.first); page < vmigrate::raw(run.first) + run.count; ++page) {
    // R1 pairs with A1 in state: page bytes before state.
    const uint8_t before = states_[page].exchange(raw(PageState::kPresent), std::memory_order_release);
    VMG_CHECK(transition_allowed(static_cast<PageState>(before), PageState::kPresent));
  }
}

bool PresenceMap::mark_zero(PageIndex page) {
  VMG_CHECK(vmigrate::raw(page) < page_count_);
  uint8_t expected = raw(PageState::kAbsent);
  // Relaxed: there are no bytes to become visible.
  return states_[vmigrate::raw(page)].compare_exchange_strong(
      expected, raw(PageState::kZero), std::memory_order_relaxed, std::memory_order_relaxed);
}

void PresenceMap::unclaim(PageRun run) {
  VMG_CHECK(vmigrate::raw(run.first) <= page_count_ && run.count <= page_count_ - vmigrate::raw(run.first));
  for (uint64_t page = vmigrate::raw(run.first); page < vmigrate::raw(run.first) + run.count; ++page) {
    // R20 pairs with A20 in claim.
    const uint8_t before = states_[page].exchange(raw(PageState::kAbsent), std::memory_order_release);
    VMG_CHECK(transition_allowed(static_cast<PageState>(before), PageState::kAbsent));
  }
}

PresenceMap::TakenBack PresenceMap::take_back(PageRun run) {
  VMG_CHECK(vmigrate::raw(run.first) <= page_count_ && run.count <= page_count_ - vmigrate::raw(run.first));
  TakenBack taken;
  for (uint64_t page = vmigrate::raw(run.first); page < vmigrate::raw(run.first) + run.count; ++page) {
    // Relaxed: nobody else uses the map.
    const uint8_t before = states_[page].exchange(raw(PageState::kAbsent), std::memory_order_relaxed);
    VMG_CHECK(before != raw(PageState::kClaimed));
    if (before == raw(PageState::kPresent)) ++taken.present_pages;
    if (before == raw(PageState::kZero)) ++taken.zero_pages;
  }
  return taken;
}

PageIndex PresenceMap::next_absent(PageIndex from) const {
  uint64_t page = vmigrate::raw(from);
  // Relaxed: only a hint where to try a claim.
  while (page < page_count_ && states_[page].load(std::memory_order_relaxed) != raw(PageState::kAbsent)) {
    ++page;
  }
  return PageIndex{page < page_count_ ? page : page_count_};
}

}  // namespace vmigrate::memory
