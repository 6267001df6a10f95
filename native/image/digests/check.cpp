#include "image/digests/check.hpp"

#include "memory/page_hasher.hpp"

namespace vmigrate::pager {
namespace {

using wire::PageState;

bool has_come(PageState state) {
  return state == PageState::kPresent || state == PageState::kZero;
}

}  // namespace

Result<std::optional<PageIndex>> first_damaged(const FilledRegion& region, const memory::DigestMap& digests,
                                               PageRun run, const std::function<bool()>& must_stop) {
  const uint64_t known = digests.known();
  if (raw(run.first) > known || run.count > known - raw(run.first))
    return Error{ErrorCode::kInvalidArgument, 0, "digests that are not known"};
  auto hasher = memory::PageHasher::create();
  if (!hasher) return hasher.error();
  const memory::Digest zeros = *memory::digest_of_zeros(region.page_bytes());
  const auto state = [&](uint64_t page) { return region.presence->state(PageIndex{page}); };
  const uint64_t end = raw(run.first) + run.count;
  for (uint64_t page = raw(run.first); page < end;) {
    uint64_t here_end = page;
    while (here_end < end && has_come(state(here_end))) ++here_end;
    hasher.value()->begin(region.file->fd(), region.page_bytes(), {PageIndex{page}, here_end - page});
    for (; page < here_end; ++page) {
      if (must_stop()) return Error{ErrorCode::kClosed, 0, "check of an image"};
      const auto found = hasher.value()->next();
      if (!found) return found.error();
      const memory::Digest digest = digests.digest(PageIndex{page});
      // A page of zeros is a hole in the file, or a page in which the kernel has left zeros.
      if (found.value() != digest || (state(page) == PageState::kZero && digest != zeros))
        return std::optional(PageIndex{page});
    }
    while (page < end && !has_come(state(page))) ++page;
  }
  return std::optional<PageIndex>();
}

}  // namespace vmigrate::pager
