#include "pager/image_copier.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "base/fault_point.hpp"
#include "pager/image_guard.hpp"
#include "pager/page_key.hpp"

namespace vmigrate::pager {

using wire::FaultPoint;
using wire::PageState;

namespace {

Error copy_error(const char* what) {
  // Our mapping of the parent's file ends in nothing: the file has shrunk. On hugetlbfs a page of the image
  // that cannot be had looks the same.
  if (errno == EFAULT) return {ErrorCode::kRegionChanged, EFAULT, what};
  return system_error(what);
}

}  // namespace

/// The first data in [page, end), an empty range at `end` if there is none; nullopt: the capture has failed.
/// A page that was a hole when its file was looked through may have been written since, before the seal, so
/// the kernel is asked about it; to ask for the end of the data as well would walk through all of it.
std::optional<ImageCopier::Data> ImageCopier::find_data(const ImageRegion& region, uint64_t page,
                                                        uint64_t end) {
  if (region.had_data(page)) {
    const uint64_t first = page;
    while (page < end && region.had_data(page)) ++page;
    return Data{first, page};
  }
  off_t data;
  do {
    data = ::lseek(region.source->fd(), static_cast<off_t>(page * region.page_bytes()), SEEK_DATA);
  } while (data < 0 && errno == EINTR);
  if (data >= 0) {
    const uint64_t first = std::min(static_cast<uint64_t>(data) / region.page_bytes(), end);
    return Data{first, std::min(first + 1, end)};
  }
  struct stat file {};
  if (errno != ENXIO || ::fstat(region.source->fd(), &file) != 0) {
    core_.fail(system_error("lseek SEEK_DATA region"));
    return std::nullopt;
  }
  // Nothing but a hole from here to the end, or the file has shrunk.
  if (static_cast<uint64_t>(file.st_size) != region.source->length_bytes()) {
    core_.fail({ErrorCode::kRegionChanged, 0, "region file changed its length"});
    return std::nullopt;
  }
  return Data{end, end};
}

bool ImageCopier::is_here(const ImageRegion& region, uint64_t page) const {
  const PageState state = region.presence->state(PageIndex{page});
  return state == PageState::kPresent || state == PageState::kZero;
}

bool ImageCopier::fill(uint32_t region_index, PageRun run) {
  ImageRegion& region = core_.regions()[region_index];
  const uint64_t end = raw(run.first) + run.count;
  for (uint64_t page = raw(run.first); page < end;) {
    const auto data = find_data(region, page, end);
    if (!data) return false;
    uint64_t zeros = 0;
    for (; page < data->first; ++page) zeros += region.presence->mark_zero(PageIndex{page}) ? 1 : 0;
    if (zeros != 0) core_.add_zero(zeros);
    while (page < data->end) {
      const uint64_t count = region.presence->claim_run(PageIndex{page}, data->end - page);
      if (count != 0 && !copy(region_index, PageRun{PageIndex{page}, count})) return false;
      page += std::max<uint64_t>(1, count);
    }
  }
  for (uint64_t page = raw(run.first); page < end; ++page) {
    const uint64_t first = page;
    while (page < end && is_here(region, page)) ++page;
    if (page != first) guard_.release(region_index, PageRun{PageIndex{first}, page - first});
  }
  return true;
}

/// A run of our own claims: bytes, then state.
bool ImageCopier::copy(uint32_t region_index, PageRun run) {
  ImageRegion& region = core_.regions()[region_index];
  const PageKey key = page_key(region_index, run.first);
  fault_point(claimed_point_, key);
  uint64_t at = raw(run.first) * region.page_bytes();
  const uint64_t length_bytes = run.count * region.page_bytes();
  const uint64_t end = at + length_bytes;
  while (at < end) {
    // System calls both ways, because the files are not ours alone: no signal may come of touching them. A
    // page that is written whole needs no zeros first; hugetlbfs cannot be written, so there the page is
    // touched.
    const ssize_t count =
        region.hugetlbfs
            ? ::pread(region.source->fd(), region.image->base() + at, end - at, static_cast<off_t>(at))
            : ::pwrite(region.image->fd(), region.source->base() + at, end - at, static_cast<off_t>(at));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      core_.fail(count == 0 ? Error{ErrorCode::kRegionChanged, 0, "copy into the image"}
                            : copy_error("copy into the image"));
      return false;
    }
    at += static_cast<uint64_t>(count);
  }
  core_.counters.copied_bytes.fetch_add(length_bytes, std::memory_order_relaxed);
  region.presence->publish(run);
  fault_point(FaultPoint::kImagePublished, key);
  // F11 pairs with F12 in FaultThread::wait_for_sweep: the states stored before, the count looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (core_.wait_count.load(std::memory_order_relaxed) != 0) core_.fault_wake.signal();
  core_.add_present(run.count);
  return true;
}

}  // namespace vmigrate::pager
