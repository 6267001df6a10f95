#include "image/serve/clone_mapper.hpp"

#include <fcntl.h>

#include <algorithm>

#include "image/serve/limits.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using uffd::RangeOutcome;
using wire::PageState;

namespace {

/// Unregisters one range and wakes its waiters. False: its process is gone.
bool release_range(int uffd, const MappedRange& range) {
  for (uint64_t at = 0; at < range.length_bytes; at += kImagePieceBytes) {
    const uint64_t length_bytes = std::min(kImagePieceBytes, range.length_bytes - at);
    // Unregistering clears the protection of the range. It wakes only waiters for missing pages, and before
    // that. So all waiters are woken once more, when no thread can begin to wait any longer.
    if (uffd::unregister_range(uffd, range.base + at, length_bytes).outcome == Outcome::kGone) return false;
    if (uffd::wake_range(uffd, range.base + at, length_bytes).outcome == Outcome::kGone) return false;
  }
  return true;
}

}  // namespace

Status release_vm(const VmMemory& memory) {
  for (const MappedRange& range : memory.ranges) {
    if (!release_range(memory.descriptors[range.descriptor_index].fd.get(), range)) return ok();
  }
  return ok();
}

void CloneMapper::map_present(const VmMemory& clone, uint32_t region_index, PageIndex page) {
  map(clone, region_index, page, PageState::kPresent, {uffd::continue_range, "UFFDIO_CONTINUE"});
}

/// In a private mapping zero pages are not pages of the file. hugetlbfs has no zero pages: there the file
/// gets a page, which the kernel zeroes.
void CloneMapper::map_zero(const VmMemory& clone, uint32_t region_index, PageIndex page) {
  if (core_.region(region_index).hugetlbfs) {
    if (!allocate_huge_page(region_index, page)) return;
    return map(clone, region_index, page, PageState::kZero, {uffd::continue_range, "UFFDIO_CONTINUE"});
  }
  map(clone, region_index, page, PageState::kZero, {uffd::zero_range, "UFFDIO_ZEROPAGE"});
}

bool CloneMapper::allocate_huge_page(uint32_t region_index, PageIndex page) {
  const FilledRegion& region = core_.region(region_index);
  int rc;
  do {
    rc = ::fallocate(region.file->fd(), FALLOC_FL_KEEP_SIZE,
                     static_cast<off_t>(raw(page) * region.page_bytes()),
                     static_cast<off_t>(region.page_bytes()));
  } while (rc != 0 && errno == EINTR);
  if (rc == 0) return true;
  core_.fail(errno == ENOMEM ? Error{ErrorCode::kNoSpace, ENOMEM, "fallocate huge page"}
                             : system_error("fallocate huge page"));
  return false;
}

void CloneMapper::map(const VmMemory& clone, uint32_t region_index, PageIndex page, PageState state,
                      const Call& call) {
  const FilledRegion& region = core_.region(region_index);
  const uint64_t page_bytes = region.page_bytes();
  const PageRun cluster = core_.cluster(region_index, page);
  const uint64_t cluster_end = raw(cluster.first) + cluster.count;
  uint64_t end = raw(page) + 1;
  // The next hole of a huge page has no page in the file yet.
  const bool is_alone = region.hugetlbfs && state == PageState::kZero;
  while (!is_alone && end < cluster_end && region.presence->state(PageIndex{end}) == state) ++end;
  const uint64_t begin_bytes = raw(page) * page_bytes;
  const uint64_t step_bytes = region.hugetlbfs ? page_bytes : wire::kPageBytesMin;
  for (const MappedRange& range : clone.ranges) {
    if (range.region_index != region_index) continue;
    const uint64_t from = std::max(begin_bytes, range.region_offset_bytes);
    const uint64_t to = std::min(end * page_bytes, range.region_offset_bytes + range.length_bytes);
    if (from >= to) continue;
    // The page that faulted. Its neighbours may wait for their own faults.
    const uint64_t needed_bytes =
        from < begin_bytes + page_bytes ? std::min(to, begin_bytes + page_bytes) - from : 0;
    if (!map_piece(clone.descriptors[range.descriptor_index].fd.get(),
                   range.base + (from - range.region_offset_bytes), to - from, needed_bytes, step_bytes,
                   call)) {
      return;
    }
  }
}

/// False: nothing more can be done for this clone now.
bool CloneMapper::map_piece(int uffd, HostAddr base, uint64_t length_bytes, uint64_t needed_bytes,
                            uint64_t step_bytes, const Call& call) {
  uint64_t at = 0;
  do {
    const RangeOutcome result = call.function(uffd, base + at, length_bytes - at);
    at += result.done_bytes;
    switch (result.outcome) {
      case Outcome::kDone:
        return true;
      case Outcome::kExists:
      case Outcome::kAgain:
        // Either the page was mapped a moment ago as a neighbour, and a waiter may have missed that wake. Or
        // the clone's address space is changing. In both cases its fault is reported again, which needs no
        // place in a list.
        if (at < needed_bytes && uffd::wake_range(uffd, base + at, step_bytes).outcome == Outcome::kGone) {
          return false;
        }
        at += step_bytes;
        break;
      case Outcome::kGone:
        return false;
      default:
        // The file has no page although the state is present: another process has punched a hole in the
        // image.
        core_.fail(uffd::call_error(result.system_errno, call.what));
        return false;
    }
  } while (at < needed_bytes);
  return true;
}

}  // namespace vmigrate::pager
