#include "image/clones.hpp"

#include <algorithm>

namespace vmigrate::pager {

using uffd::Outcome;
using uffd::RangeOutcome;
using wire::PageState;

void CloneMapper::map_present(const VmMemory& clone, uint32_t region_index, PageIndex page) {
  map(clone, region_index, page, PageState::kPresent, {uffd::continue_range, "UFFDIO_CONTINUE"});
}

/// In a private mapping zero pages are not pages of the file. hugetlbfs has no zero pages, and no holes are
/// known there.
void CloneMapper::map_zero(const VmMemory& clone, uint32_t region_index, PageIndex page) {
  map(clone, region_index, page, PageState::kZero, {uffd::zero_range, "UFFDIO_ZEROPAGE"});
}

void CloneMapper::map(const VmMemory& clone, uint32_t region_index, PageIndex page, PageState state,
                      const Call& call) {
  const ImageRegion& region = core_.regions()[region_index];
  const uint64_t page_bytes = region.page_bytes();
  const PageRun cluster = region.cluster(page);
  const uint64_t cluster_end = raw(cluster.first) + cluster.count;
  uint64_t end = raw(page) + 1;
  while (end < cluster_end && region.presence->state(PageIndex{end}) == state) ++end;
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

void CloneMapper::let_go(const VmMemory& clone) {
  static_cast<void>(release_vm(clone));
}

}  // namespace vmigrate::pager
