#include "image/parent/copier.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"
#include "image/parent/guard.hpp"
#include "image/serve/limits.hpp"

namespace vmigrate::pager {

using wire::InjectPoint;
using wire::PageState;

namespace {

Error copy_error(const char* what) {
  // The parent's file has shrunk, so our mapping of it ends before the page. On hugetlbfs a page of the image
  // that cannot be allocated looks the same.
  if (errno == EFAULT) return {ErrorCode::kRegionChanged, EFAULT, what};
  return system_error(what);
}

}  // namespace

ImageCopier::ImageCopier(ParentMemory& memory, ParentGuard& guard, InjectPoint claimed)
    : memory_(memory), core_(memory.core()), guard_(guard), claimed_point_(claimed) {
  if (memory.process() != nullptr) process_bytes_.resize(kImageClusterBytes);
}

/// The first data in [page, end), or an empty range at `end` if there is none. nullopt: the capture has
/// failed. A page that was a hole when look_for_data was called may have been written before the seal, so
/// this asks the kernel. Asking for the end of the data as well would walk through all of it.
std::optional<ImageCopier::Data> ImageCopier::find_data(uint32_t region_index, uint64_t page, uint64_t end) {
  const ParentRegion& region = memory_.region(region_index);
  if (region.had_data(page)) {
    const uint64_t first = page;
    while (page < end && region.had_data(page)) ++page;
    return Data{first, page};
  }
  if (region.is_in_process) {
    const auto own = find_own(region_index, page, end);
    if (!own) return std::nullopt;
    if (*own == page) return Data{page, page + 1};
    end = *own;  // no need to search further for data of the file
  }
  off_t data;
  do {
    data = ::lseek(region.file->fd(), static_cast<off_t>(page * region.file->page_bytes()), SEEK_DATA);
  } while (data < 0 && errno == EINTR);
  struct stat file {};
  if ((data < 0 && errno != ENXIO) || ::fstat(region.file->fd(), &file) != 0) {
    core_.fail(system_error("lseek SEEK_DATA region"));
    return std::nullopt;
  }
  // A file that has shrunk shows a hole where its data was.
  if (static_cast<uint64_t>(file.st_size) != region.file->length_bytes()) {
    core_.fail({ErrorCode::kRegionChanged, 0, "region file changed its length"});
    return std::nullopt;
  }
  const uint64_t first =
      data < 0 ? end : std::min(static_cast<uint64_t>(data) / region.file->page_bytes(), end);
  return Data{first, std::min(first + 1, end)};
}

/// The first page in [page, end) of which the parent has its own copy, or `end`.
std::optional<uint64_t> ImageCopier::find_own(uint32_t region_index, uint64_t page, uint64_t end) {
  const uint64_t page_bytes = memory_.page_bytes(region_index);
  uint64_t found = end;
  const Status status = memory_.process()->each_own_run(
      region_index, page * page_bytes, (end - page) * page_bytes,
      [&](PageRun run) { found = std::min(found, raw(run.first) * wire::kPageBytesMin / page_bytes); });
  // A process that is being killed may have lost pages, which then look like pages that it never had.
  const Status whole = status && found == end ? memory_.process()->whole() : status;
  if (whole) return found;
  core_.fail(whole.error());
  return std::nullopt;
}

bool ImageCopier::is_here(const FilledRegion& region, uint64_t page) const {
  const PageState state = region.presence->state(PageIndex{page});
  return state == PageState::kPresent || state == PageState::kZero;
}

bool ImageCopier::fill(uint32_t region_index, PageRun run) {
  FilledRegion& region = core_.region(region_index);
  const uint64_t end = raw(run.first) + run.count;
  for (uint64_t page = raw(run.first); page < end;) {
    const auto data = find_data(region_index, page, end);
    if (!data) return false;
    uint64_t zeros = 0;
    for (; page < data->first; ++page) zeros += region.presence->mark_zero(PageIndex{page}) ? 1 : 0;
    if (zeros != 0) core_.fill().add_zero(zeros);
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

/// Like pwrite. Uses system calls for both directions, because other processes own the files too: touching
/// the bytes must not raise a signal.
ssize_t ImageCopier::move_bytes(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes) {
  const FilledRegion& image = core_.region(region_index);
  const ParentRegion& parent = memory_.region(region_index);
  const auto offset = static_cast<off_t>(offset_bytes);
  if (parent.is_in_process) {
    const std::span<std::byte> part(process_bytes_.data(),
                                    std::min<uint64_t>(length_bytes, process_bytes_.size()));
    if (const Status status = memory_.process()->read(region_index, offset_bytes, part); !status) {
      core_.fail(status.error());
      return 0;
    }
    return ::pwrite(image.file->fd(), part.data(), part.size(), offset);
  }
  // A page that is written whole need not be zeroed first. hugetlbfs cannot be written, so the page is
  // touched there.
  return image.hugetlbfs
             ? ::pread(parent.file->fd(), image.file->base() + offset_bytes, length_bytes, offset)
             : ::pwrite(image.file->fd(), parent.file->base() + offset_bytes, length_bytes, offset);
}

/// Publishes a run that this thread has claimed: bytes, then state.
bool ImageCopier::copy(uint32_t region_index, PageRun run) {
  FilledRegion& region = core_.region(region_index);
  const PageKey key = page_key(region_index, run.first);
  inject_point(claimed_point_, key);
  uint64_t at = raw(run.first) * region.page_bytes();
  const uint64_t length_bytes = run.count * region.page_bytes();
  const uint64_t end = at + length_bytes;
  while (at < end) {
    const ssize_t count = move_bytes(region_index, at, end - at);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      // An earlier error remains the failure.
      core_.fail(count == 0 ? Error{ErrorCode::kRegionChanged, 0, "copy into the image"}
                            : copy_error("copy into the image"));
      return false;
    }
    at += static_cast<uint64_t>(count);
  }
  memory_.counters.copied_bytes.fetch_add(length_bytes, std::memory_order_relaxed);
  region.presence->publish(run);
  inject_point(InjectPoint::kImagePublished, key);
  core_.wake_waits();
  core_.fill().add_present(run.count);
  return true;
}

}  // namespace vmigrate::pager
