// Which pages hold anything, for files whose holes tell nothing.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/check.hpp"
#include "memory/region.hpp"

namespace vmigrate::memory {
namespace {

/// Stays in the second-level cache, and is worth a system call.
constexpr uint64_t kReadBytes = 256 << 10;

bool all_zero(const std::byte* bytes, uint64_t length_bytes) {
  // A page that is zero at its start is compared with itself, one byte on.
  return bytes[0] == std::byte{0} && std::memcmp(bytes, bytes + 1, length_bytes - 1) == 0;
}

Status read_all(int fd, std::byte* out, uint64_t offset_bytes, uint64_t length_bytes) {
  for (uint64_t done = 0; done < length_bytes;) {
    const ssize_t count =
        ::pread(fd, out + done, length_bytes - done, static_cast<off_t>(offset_bytes + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return system_error("read region");
    if (count == 0) return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
    done += static_cast<uint64_t>(count);
  }
  return ok();
}

}  // namespace

Status Region::each_nonzero_run(PageRun within, const std::function<void(PageRun)>& visit) const {
  VMG_CHECK(raw(within.first) <= page_count() && within.count <= page_count() - raw(within.first));
  std::vector<std::byte> buffer(kReadBytes);
  const uint64_t end_page = raw(within.first) + within.count;
  PageRun run{within.first, 0};
  const auto note = [&](uint64_t page, bool nonzero) {
    if (nonzero) {
      if (run.count == 0) run.first = PageIndex{page};
      ++run.count;
    } else if (run.count != 0) {
      visit(run);
      run.count = 0;
    }
  };
  for (uint64_t page = raw(within.first); page < end_page;) {
    const uint64_t pages = std::clamp<uint64_t>(kReadBytes / page_bytes_, 1, end_page - page);
    // Many small pages at once, or one large page in parts.
    const uint64_t part_bytes = std::min(kReadBytes, pages * page_bytes_);
    bool nonzero = false;
    for (uint64_t at = 0; at < pages * page_bytes_ && !nonzero; at += part_bytes) {
      const Status read = read_all(fd_.get(), buffer.data(), page * page_bytes_ + at, part_bytes);
      if (!read) return read;
      if (pages == 1) {
        nonzero = !all_zero(buffer.data(), part_bytes);
        continue;
      }
      for (uint64_t i = 0; i < pages; ++i)
        note(page + i, !all_zero(buffer.data() + i * page_bytes_, page_bytes_));
    }
    if (pages == 1) note(page, nonzero);
    page += pages;
  }
  note(end_page, false);
  return ok();
}

}  // namespace vmigrate::memory
