#include "image/holder/partial_reader.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"

namespace vmigrate::pager {

using wire::PageState;

Status PartialReader::check_serving() const {
  const ImageState state = core_.state();
  if (state == ImageState::kIdle || state == ImageState::kCopying || state == ImageState::kComplete)
    return ok();
  if (const auto failure = core_.failure()) return *failure;
  return Error{ErrorCode::kClosed, 0, "the image was closed"};
}

bool PartialReader::is_here(uint64_t offset_bytes, uint64_t length_bytes) const {
  // read says why nobody is served.
  if (!check_serving()) return true;
  const FilledRegion& region = core_.region(region_index_);
  const uint64_t first = offset_bytes / region.page_bytes();
  const uint64_t end = (offset_bytes + length_bytes - 1) / region.page_bytes() + 1;
  for (uint64_t page = first; page < end; ++page) {
    const PageState state = region.presence->state(PageIndex{page});
    if (state != PageState::kPresent && state != PageState::kZero) return false;
  }
  inject_point(wire::InjectPoint::kImageServeSeen, page_key(region_index_, PageIndex{first}));
  return true;
}

Status PartialReader::read(uint64_t offset_bytes, std::span<std::byte> out) const {
  if (auto status = check_serving(); !status) return status;
  const FilledRegion& region = core_.region(region_index_);
  const uint64_t page_bytes = region.page_bytes();
  while (!out.empty()) {
    // The longest run of pages that are all zero, or all are not, from the offset on.
    uint64_t page = offset_bytes / page_bytes;
    const auto is_zero = [&](uint64_t at) {
      return region.presence->state(PageIndex{at}) == PageState::kZero;
    };
    const bool zeros = is_zero(page);
    const uint64_t end_bytes = offset_bytes + out.size();
    while (++page * page_bytes < end_bytes && is_zero(page) == zeros) {
    }
    const std::span<std::byte> part = out.first(std::min(page * page_bytes, end_bytes) - offset_bytes);
    if (zeros) {
      std::memset(part.data(), 0, part.size());
    } else if (auto status = read_file(offset_bytes, part); !status) {
      return status;
    }
    offset_bytes += part.size();
    out = out.subspan(part.size());
  }
  return ok();
}

/// A system call, because another process may cut the file.
Status PartialReader::read_file(uint64_t offset_bytes, std::span<std::byte> out) const {
  const FilledRegion& region = core_.region(region_index_);
  while (!out.empty()) {
    const ssize_t count =
        ::pread(region.file->fd(), out.data(), out.size(), static_cast<off_t>(offset_bytes));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return system_error("pread image");
    if (count == 0) return Error{ErrorCode::kRegionChanged, 0, "image file is shorter than its region"};
    offset_bytes += static_cast<uint64_t>(count);
    out = out.subspan(static_cast<size_t>(count));
  }
  return ok();
}

Status PartialReader::each_data_run(const std::function<void(PageRun)>& visit) const {
  if (auto status = check_serving(); !status) return status;
  if (!core_.fill().all_done())
    return Error{ErrorCode::kInvalidArgument, 0, "only the root says what is zero, until every page is here"};
  const FilledRegion& region = core_.region(region_index_);
  const auto is_data = [&](uint64_t page) {
    return region.presence->state(PageIndex{page}) == PageState::kPresent;
  };
  for (uint64_t page = 0; page < region.page_count();) {
    const uint64_t first = page;
    while (page < region.page_count() && is_data(page)) ++page;
    if (page != first)
      visit(PageRun{PageIndex{first}, page - first});
    else
      ++page;
  }
  return ok();
}

std::optional<RegionReader::Partial> PartialReader::partial() const {
  const FilledRegion& region = core_.region(region_index_);
  return Partial{
      .presence = {.base = region.presence->bytes(),
                   .fd = region.presence->fd(),
                   .fd_offset_bytes = wire::kPresenceHeaderBytes,
                   .length_bytes = region.page_count()},
      .bytes = {.base = region.file->base(),
                .fd = region.file->fd(),
                .fd_offset_bytes = 0,
                .length_bytes = region.file->length_bytes()},
  };
}

}  // namespace vmigrate::pager
