#include "uffd/page_scan.hpp"

#include <fcntl.h>
#include <linux/types.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>

#include "base/unique_fd.hpp"

namespace vmigrate::uffd {
namespace {

// The kernel's ABI, newer than the headers of the oldest kernel that we build on.
struct Argument {
  __u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
  __u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct Region {
  __u64 start, end, categories;
};
constexpr unsigned long kPagemapScan = _IOWR('f', 16, Argument);
enum Flag : __u64 { kProtectMatching = 1 << 0, kCheckAsync = 1 << 1 };
enum Category : __u64 { kWritten = 1 << 1, kPresent = 1 << 3, kSwapped = 1 << 4 };

constexpr size_t kRegionsMax = 512;

Status scan(int pagemap, const Stretch& range, Argument argument, const VisitStretch& visit) {
  std::array<Region, kRegionsMax> regions;
  argument.size = sizeof argument;
  argument.start = raw(range.base);
  argument.end = raw(range.base) + range.length_bytes;
  argument.vec = reinterpret_cast<uintptr_t>(regions.data());
  argument.vec_len = regions.size();
  while (argument.start < argument.end) {
    const int count = ::ioctl(pagemap, kPagemapScan, &argument);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      if (errno == ESRCH) return Error{ErrorCode::kProcessGone, errno, "PAGEMAP_SCAN"};
      // EPERM: a mapping in the range is not registered for asynchronous write-protection.
      if (errno == EPERM || errno == ENOTTY || errno == EINVAL)
        return Error{ErrorCode::kUnsupported, errno, "PAGEMAP_SCAN"};
      return system_error("PAGEMAP_SCAN");
    }
    for (int i = 0; i < count; ++i) {
      const Region& region = regions[static_cast<size_t>(i)];
      visit({HostAddr{region.start}, region.end - region.start});
    }
    // The kernel stops where the vector is full. Without progress nothing is mapped there any more.
    if (argument.walk_end <= argument.start)
      return Error{ErrorCode::kProcessGone, 0, "PAGEMAP_SCAN: the range is not mapped"};
    argument.start = argument.walk_end;
  }
  return ok();
}

}  // namespace

Status protect_written(int pagemap, const Stretch& range, const VisitStretch& visit) {
  Argument argument{};
  argument.flags = kProtectMatching | kCheckAsync;
  argument.category_mask = argument.return_mask = kWritten;
  return scan(pagemap, range, argument, visit);
}

/// A page that is not mapped has a marker instead, if its protection is in place. The kernel shows a marker
/// as a swapped page.
Status each_protected(int pagemap, const Stretch& range, const VisitStretch& visit) {
  Argument argument{};
  argument.flags = kCheckAsync;
  argument.category_inverted = argument.category_mask = kWritten;
  argument.category_anyof_mask = kPresent | kSwapped;
  // Runs are as long as possible if nothing is told of their pages.
  argument.return_mask = kWritten;
  return scan(pagemap, range, argument, visit);
}

bool has_page_scan() {
  const UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap.valid()) return false;
  Argument argument{};
  argument.size = sizeof argument;
  // An empty range of our own leaves nothing to walk, so only a kernel without the call refuses.
  argument.category_mask = argument.return_mask = kWritten;
  return ::ioctl(pagemap.get(), kPagemapScan, &argument) >= 0;
}

}  // namespace vmigrate::uffd
