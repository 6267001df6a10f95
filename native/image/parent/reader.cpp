#include "image/parent/reader.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "image/serve/limits.hpp"

namespace vmigrate::pager {

using wire::PageState;

ImageReader::ImageReader(ParentMemory& memory, ParentGuard& guard, uint32_t region_index)
    : memory_(memory),
      core_(memory.core()),
      region_index_(region_index),
      copier_(memory, guard, wire::InjectPoint::kImageReaderClaimed) {}

Status ImageReader::check_sealed() const {
  const ImageState state = core_.state();
  if (state == ImageState::kComplete || state == ImageState::kCopying) return ok();
  if (const auto failure = core_.failure()) return *failure;
  return Error{ErrorCode::kClosed, 0, "the image has no content yet, or its capture was closed"};
}

/// Returns when the page is in the image, or cannot come.
Status ImageReader::bring(PageIndex page) const {
  const auto& presence = *core_.region(region_index_).presence;
  for (;;) {
    const PageState state = presence.state(page);
    if (state == PageState::kPresent || state == PageState::kZero) return ok();
    if (auto status = check_sealed(); !status) return status;
    if (core_.must_stop() != ImageCore::Stop::kNone)
      return Error{ErrorCode::kClosed, 0, "the capture was closed"};
    if (state == PageState::kAbsent) {
      const std::lock_guard lock(copier_mutex_);
      if (!memory_.enter()) continue;
      (void)copier_.fill(region_index_, core_.cluster(region_index_, page));
      memory_.leave();
    } else {
      // Another thread copies it, which takes some microseconds.
      ::sched_yield();
    }
  }
}

/// A system call, because another process may cut the file.
Status ImageReader::read_present(uint64_t offset_bytes, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t count = ::pread(core_.region(region_index_).file->fd(), out.data(), out.size(),
                                  static_cast<off_t>(offset_bytes));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return system_error("pread image");
    if (count == 0) return Error{ErrorCode::kRegionChanged, 0, "image file is shorter than its region"};
    offset_bytes += static_cast<uint64_t>(count);
    out = out.subspan(static_cast<size_t>(count));
  }
  return ok();
}

Status ImageReader::read(uint64_t offset_bytes, std::span<std::byte> out) const {
  if (auto status = check_sealed(); !status) return status;
  const FilledRegion& region = core_.region(region_index_);
  const uint64_t page_bytes = region.page_bytes();
  while (!out.empty()) {
    // The longest run of pages in one state, from the offset on.
    uint64_t page = offset_bytes / page_bytes;
    if (auto status = bring(PageIndex{page}); !status) return status;
    const PageState state = region.presence->state(PageIndex{page});
    const uint64_t end_bytes = offset_bytes + out.size();
    while (++page * page_bytes < end_bytes && region.presence->state(PageIndex{page}) == state) {
    }
    const uint64_t length_bytes = std::min(page * page_bytes, end_bytes) - offset_bytes;
    const std::span<std::byte> part = out.first(length_bytes);
    if (state == PageState::kZero) {
      std::memset(part.data(), 0, part.size());
    } else if (auto status = read_present(offset_bytes, part); !status) {
      return status;
    }
    offset_bytes += length_bytes;
    out = out.subspan(length_bytes);
  }
  return ok();
}

/// A page that had no data when its file was asked, and has not been copied, was a hole at the fork point:
/// a write into a hole is held back until the page is marked zero. The reverse may be wrong: the parent may
/// have written a page that was marked zero. It is then read, as zeros.
Status ImageReader::each_data_run(const std::function<void(PageRun)>& visit) const {
  if (auto status = check_sealed(); !status) return status;
  const FilledRegion& region = core_.region(region_index_);
  std::vector<bool> has_data(region.page_count());
  // Looking releases nothing. Once every page is here the states alone tell, and the parent may be gone.
  if (!core_.fill().all_done()) {
    const Status looked =
        memory_.each_data_page(region_index_, [&](uint64_t page) { has_data[page] = true; });
    if (!looked && !core_.fill().all_done()) return looked;
  }
  const auto is_data = [&](uint64_t page) {
    const PageState state = region.presence->state(PageIndex{page});
    return state == PageState::kPresent || (state != PageState::kZero && has_data[page]);
  };
  for (uint64_t page = 0; page < has_data.size();) {
    const uint64_t first = page;
    while (page < has_data.size() && is_data(page)) ++page;
    if (page != first)
      visit(PageRun{PageIndex{first}, page - first});
    else
      ++page;
  }
  return ok();
}

}  // namespace vmigrate::pager
