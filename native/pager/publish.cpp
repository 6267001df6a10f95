#include "pager/publish.hpp"

#include <fcntl.h>

#include <algorithm>

#include "base/check.hpp"
#include "base/fault_point.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using uffd::RangeOutcome;

namespace {

Error uffd_error(const RangeOutcome& result, const char* what) {
  switch (result.outcome) {
    case Outcome::kGone:
      return {ErrorCode::kProcessGone, result.system_errno, what};
    case Outcome::kNoPage:
      return {ErrorCode::kRegionChanged, result.system_errno, what};
    case Outcome::kNoMemory:
      return {ErrorCode::kOutOfMemory, result.system_errno, what};
    default:
      return system_error(what, result.system_errno);
  }
}

}  // namespace

template <typename Visit>
bool Publisher::each_piece(const TargetRegion& region, PageRun run, Visit visit) {
  const uint64_t page_bytes = region.region->page_bytes();
  const uint64_t begin = raw(run.first) * page_bytes;
  const uint64_t end = begin + run.count * page_bytes;
  for (const MappedRange& range : region.ranges) {
    const uint64_t from = std::max(begin, range.region_offset_bytes);
    const uint64_t to = std::min(end, range.region_offset_bytes + range.length_bytes);
    if (from >= to) continue;
    const Piece piece{core_.vm().descriptors[range.descriptor_index].fd.get(),
                      range.base + (from - range.region_offset_bytes), to - from};
    if (!visit(piece, PageIndex{from / page_bytes})) return false;
  }
  return true;
}

void Publisher::wake(const Piece& piece) {
  const RangeOutcome result = uffd::wake_range(piece.uffd, piece.base, piece.length_bytes);
  if (result.outcome != Outcome::kDone) core_.fail(uffd_error(result, "UFFDIO_WAKE"));
}

void Publisher::defer(uint32_t region_index, PageRun run) {
  // Both threads start nothing new that could end here while the list is nearly full (limits.hpp).
  VMG_CHECK(retry_count_ < retries_.size());
  retries_[retry_count_++] = {region_index, run};
}

bool Publisher::retry() {
  const size_t count = std::exchange(retry_count_, 0);
  const auto pending = retries_;
  bool moved = false;
  for (size_t i = 0; i < count; ++i) moved |= continue_run(pending[i].region_index, pending[i].run);
  return moved;
}

/// False: put off.
bool Publisher::continue_run(uint32_t region_index, PageRun run) {
  const TargetRegion& region = core_.regions()[region_index];
  const uint64_t page_bytes = region.region->page_bytes();
  return each_piece(region, run, [&](const Piece& piece, PageIndex first) {
    uint64_t at = 0;
    while (at < piece.length_bytes) {
      const RangeOutcome result = uffd::continue_range(piece.uffd, piece.base + at, piece.length_bytes - at);
      at += result.done_bytes;
      switch (result.outcome) {
        case Outcome::kDone:
          return true;
        case Outcome::kExists:
          // Mapped by the other thread a moment ago, or through a second mapping of the region: whoever waits
          // may have missed that wake.
        case Outcome::kNoPage: {
          // The VM discarded the page under us. Its waiters fault again and find it present: serve_present
          // decides.
          at -= at % page_bytes;
          wake(Piece{piece.uffd, piece.base + at, page_bytes});
          at += page_bytes;
          break;
        }
        case Outcome::kAgain: {
          const uint64_t page = raw(first) + at / page_bytes;
          defer(region_index, PageRun{PageIndex{page}, raw(run.first) + run.count - page});
          return false;
        }
        default:
          core_.fail(uffd_error(result, "UFFDIO_CONTINUE"));
          return false;
      }
    }
    return true;
  });
}

void Publisher::account(uint32_t region_index, PageRun run) {
  // F1 pairs with F2 in DemandThread::wait_for_claim: the states stored before, the waits looked at after.
  // Either this thread sees the wait, or the waiter sees the page present.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const PageKey first = page_key(region_index, run.first);
  uint64_t woken_ns = 0;
  const size_t resolved = core_.waits.resolve(first, first + run.count, [&](uint64_t read_ns) {
    if (woken_ns == 0) woken_ns = now_ns();
    core_.stats.record(read_ns, woken_ns);
  });
  if (resolved != 0) {
    // F3 pairs with F4 in DemandThread::pause_reading: the count lowered before, the flag looked at after.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (core_.reading_paused.load(std::memory_order_relaxed)) core_.demand_wake.signal();
  }
  core_.add_present(run.count);
}

void Publisher::publish(uint32_t region_index, PageRun run) {
  fault_point(wire::FaultPoint::kTargetBeforePublish, page_key(region_index, run.first));
  core_.regions()[region_index].presence->publish(run);
  const PageKey first = page_key(region_index, run.first);
  const PageKey wanted = run.count == 1 ? 0 : core_.waits.find(first, first + run.count);
  if (wanted > first) {
    // From the awaited page to the end, then what lies before it: nothing is continued twice.
    const uint64_t before = wanted - first;
    continue_run(region_index, PageRun{key_page(wanted), run.count - before});
    continue_run(region_index, PageRun{run.first, before});
  } else {
    continue_run(region_index, run);
  }
  account(region_index, run);
}

void Publisher::serve_present(uint32_t region_index, PageIndex page) {
  const TargetRegion& region = core_.regions()[region_index];
  each_piece(region, PageRun{page, 1}, [&](const Piece& piece, PageIndex) {
    const RangeOutcome result = uffd::continue_range(piece.uffd, piece.base, piece.length_bytes);
    switch (result.outcome) {
      case Outcome::kDone:
        return true;
      case Outcome::kExists:
        wake(piece);
        return true;
      case Outcome::kNoPage:
        return zero_piece(region_index, page, piece);
      case Outcome::kAgain:
        defer(region_index, PageRun{page, 1});
        return false;
      default:
        core_.fail(uffd_error(result, "UFFDIO_CONTINUE"));
        return false;
    }
  });
}

/// Maps zeros, or what has come into the page cache meanwhile. False: put off, or the session has failed.
bool Publisher::zero_piece(uint32_t region_index, PageIndex page, const Piece& piece) {
  const TargetRegion& region = core_.regions()[region_index];
  const uint64_t page_bytes = region.region->page_bytes();
  RangeOutcome result{};
  if (region.hugetlbfs) {
    // No zero page there: an allocated page is zeroed by the kernel, an existing one is left as it is.
    int rc;
    do {
      rc = ::fallocate(region.region->fd(), FALLOC_FL_KEEP_SIZE, static_cast<off_t>(raw(page) * page_bytes),
                       static_cast<off_t>(page_bytes));
    } while (rc != 0 && errno == EINTR);
    if (rc != 0) {
      core_.fail(errno == ENOMEM ? Error{ErrorCode::kNoSpace, ENOMEM, "fallocate huge page"}
                                 : system_error("fallocate huge page"));
      return false;
    }
    result = uffd::continue_range(piece.uffd, piece.base, piece.length_bytes);
  } else {
    result = uffd::zero_range(piece.uffd, piece.base, piece.length_bytes);
    if (result.outcome == Outcome::kExists && result.done_bytes < page_bytes) {
      // In the page cache already, mapped or not.
      result = uffd::continue_range(piece.uffd, piece.base, page_bytes);
    }
    if (result.outcome == Outcome::kNoMemory) {
      // tmpfs says ENOMEM when its size limit is reached.
      core_.fail({ErrorCode::kNoSpace, result.system_errno, "UFFDIO_ZEROPAGE"});
      return false;
    }
  }
  if (result.outcome == Outcome::kExists) {
    wake(Piece{piece.uffd, piece.base, page_bytes});
    return true;
  }
  if (result.outcome == Outcome::kAgain) {
    // Asking the kernel to report the fault again costs no place in a list.
    wake(Piece{piece.uffd, piece.base, page_bytes});
    return false;
  }
  if (result.outcome != Outcome::kDone) {
    core_.fail(uffd_error(result, "UFFDIO_ZEROPAGE"));
    return false;
  }
  return true;
}

void Publisher::serve_zero(uint32_t region_index, PageIndex page) {
  const TargetRegion& region = core_.regions()[region_index];
  const uint64_t page_bytes = region.region->page_bytes();
  const uint64_t count_max = region.hugetlbfs ? 1 : std::max<uint64_t>(1, kZeroBatchBytes / page_bytes);
  uint64_t count = 1;
  while (count < count_max && raw(page) + count < region.presence->page_count() &&
         region.presence->state(PageIndex{raw(page) + count}) == wire::PageState::kZero) {
    ++count;
  }
  each_piece(region, PageRun{page, count},
             [&](const Piece& piece, PageIndex first) { return zero_piece(region_index, first, piece); });
}

}  // namespace vmigrate::pager
