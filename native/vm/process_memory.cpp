#include "vm/process_memory.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "vm/process_file_error.hpp"

namespace vmigrate::pager {
namespace {

// An entry of /proc/PID/pagemap.
constexpr uint64_t kPresent = uint64_t{1} << 63;
constexpr uint64_t kSwapped = uint64_t{1} << 62;
constexpr uint64_t kOfFile = uint64_t{1} << 61;
constexpr unsigned kSwapTypeBits = 5;
constexpr uint64_t kSwapOffsetMask = (uint64_t{1} << 50) - 1;
/// Swap areas are numbered from 0; the kernel numbers its own kinds of entries from the end.
constexpr uint64_t kSwapTypeOfKernel = 16;
/// In a marker the offset field says what the marker marks; this value is write-protection.
constexpr uint64_t kWriteProtectMarker = 1;

/// Whether this is a page of the process's own. If nothing is mapped but write-protection is remembered, the
/// kernel shows a marker as a swapped page. A marker that cannot be distinguished from a page counts as a
/// page.
bool is_own(uint64_t entry) {
  if ((entry & kPresent) != 0) return (entry & kOfFile) == 0;
  if ((entry & kSwapped) == 0) return false;
  const uint64_t type = entry & ((1u << kSwapTypeBits) - 1);
  const uint64_t offset = entry >> kSwapTypeBits & kSwapOffsetMask;
  return type < kSwapTypeOfKernel || offset != kWriteProtectMarker;
}

UniqueFd open_of(pid_t pid, const char* name) {
  char path[48];
  std::snprintf(path, sizeof path, "/proc/%d/%s", static_cast<int>(pid), name);
  return UniqueFd(::open(path, O_RDONLY | O_CLOEXEC));
}

Error read_error(ssize_t count, const char* what) {
  // There is nothing to read: the address space is gone with its process.
  return count == 0 ? Error{ErrorCode::kProcessGone, 0, what} : process_file_error(what);
}

}  // namespace

Result<std::unique_ptr<ProcessMemory>> ProcessMemory::open(const VmMemory& memory) {
  std::unique_ptr<ProcessMemory> opened(new ProcessMemory(memory));
  opened->bytes_ = open_of(memory.pid, "mem");
  if (!opened->bytes_.valid()) return process_file_error("open /proc/PID/mem");
  opened->page_map_ = open_of(memory.pid, "pagemap");
  if (!opened->page_map_.valid()) return process_file_error("open /proc/PID/pagemap");
  opened->status_ = open_of(memory.pid, "status");
  if (!opened->status_.valid()) return process_file_error("open /proc/PID/status");
  return opened;
}

/// A process that is being killed has SIGKILL among its pending signals until the end. The out-of-memory
/// killer also takes memory only after it has sent that signal.
Status ProcessMemory::whole() const {
  constexpr uint64_t kill_bit = uint64_t{1} << (SIGKILL - 1);
  std::array<char, 4096> text;
  const ssize_t count = ::pread(status_.get(), text.data(), text.size() - 1, 0);
  if (count <= 0) return read_error(count, "read /proc/PID/status");
  text[static_cast<size_t>(count)] = '\0';
  for (const char* name : {"\nSigPnd:", "\nShdPnd:"}) {
    const char* found = std::strstr(text.data(), name);
    if (found == nullptr || (std::strtoull(found + std::strlen(name), nullptr, 16) & kill_bit) != 0)
      return Error{ErrorCode::kProcessGone, 0, "the process is being killed"};
  }
  return ok();
}

template <typename Visit>
Status ProcessMemory::each_part(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes,
                                Visit visit) const {
  for (const MappedRange& range : memory_.ranges) {
    if (range.region_index != region_index) continue;
    const uint64_t from = std::max(offset_bytes, range.region_offset_bytes);
    const uint64_t to = std::min(offset_bytes + length_bytes, range.region_offset_bytes + range.length_bytes);
    if (from >= to) continue;
    const Status status = visit(range.base + (from - range.region_offset_bytes), from, to - from);
    if (!status) return status;
  }
  return ok();
}

Status ProcessMemory::each_own_run(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes,
                                   const std::function<void(PageRun)>& visit) const {
  constexpr uint64_t page_bytes = wire::kPageBytesMin;
  std::array<uint64_t, 1024> entries;
  return each_part(region_index, offset_bytes, length_bytes,
                   [&](HostAddr base, uint64_t offset, uint64_t length) {
                     for (uint64_t done = 0; done < length / page_bytes;) {
                       const uint64_t wanted = std::min<uint64_t>(entries.size(), length / page_bytes - done);
                       const ssize_t count =
                           ::pread(page_map_.get(), entries.data(), wanted * sizeof(uint64_t),
                                   static_cast<off_t>((raw(base) / page_bytes + done) * sizeof(uint64_t)));
                       if (count < 0 && errno == EINTR) continue;
                       if (count <= 0) return Status(read_error(count, "read /proc/PID/pagemap"));
                       const uint64_t got = static_cast<uint64_t>(count) / sizeof(uint64_t);
                       for (uint64_t i = 0; i < got;) {
                         const uint64_t first = i;
                         while (i < got && is_own(entries[i])) ++i;
                         if (i != first)
                           visit(PageRun{PageIndex{offset / page_bytes + done + first}, i - first});
                         while (i < got && !is_own(entries[i])) ++i;
                       }
                       done += got;
                     }
                     return ok();
                   });
}

Status ProcessMemory::read(uint32_t region_index, uint64_t offset_bytes, std::span<std::byte> out) const {
  return each_part(
      region_index, offset_bytes, out.size(), [&](HostAddr base, uint64_t offset, uint64_t length) {
        for (uint64_t done = 0; done < length;) {
          const ssize_t count = ::pread(bytes_.get(), out.data() + (offset - offset_bytes) + done,
                                        length - done, static_cast<off_t>(raw(base) + done));
          if (count < 0 && errno == EINTR) continue;
          if (count <= 0) return Status(read_error(count, "read /proc/PID/mem"));
          done += static_cast<uint64_t>(count);
        }
        return ok();
      });
}

}  // namespace vmigrate::pager
