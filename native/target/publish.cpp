#include "target/publish.hpp"

#include <fcntl.h>

#include <algorithm>

#include "base/check.hpp"
#include "base/inject_point.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using uffd::RangeOutcome;

namespace {

/// The unit in which CONTINUE and ZEROPAGE map and stop. One of our pages may hold many of them: if a VM
/// discards one, the others stay mapped.
uint64_t kernel_page_bytes(const FilledRegion& region) {
  return region.hugetlbfs ? region.page_bytes() : wire::kPageBytesMin;
}

/// How many pages from this one on are present, at most so many.
uint64_t present_from(const FilledRegion& region, PageIndex first, uint64_t count_max) {
  uint64_t count = 0;
  while (count < count_max && raw(first) + count < region.page_count() &&
         region.presence->state(PageIndex{raw(first) + count}) == wire::PageState::kPresent) {
    ++count;
  }
  return count;
}

}  // namespace

template <typename Visit>
bool Publisher::each_piece(uint32_t region_index, PageRun run, Visit visit) {
  const uint64_t page_bytes = core_.region(region_index).page_bytes();
  const uint64_t begin = raw(run.first) * page_bytes;
  const uint64_t end = begin + run.count * page_bytes;
  for (const MappedRange& range : core_.ranges(region_index)) {
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
  if (result.outcome != Outcome::kDone) core_.fail(uffd::call_error(result.system_errno, "UFFDIO_WAKE"));
}

void Publisher::defer(uint32_t region_index, PageRun run) {
  // Neither thread starts anything that could end here while the list is nearly full (limits.hpp).
  VMG_CHECK(retry_count_ < retries_.size());
  retries_[retry_count_++] = {region_index, run};
}

bool Publisher::is_awaited(uint32_t region_index, PageRun run) const {
  const PageKey first = page_key(region_index, run.first);
  return core_.waits.find(first, first + run.count) != 0;
}

bool Publisher::retry() {
  const size_t count = std::exchange(retry_count_, 0);
  const auto pending = retries_;
  bool moved = false;
  for (size_t i = 0; i < count; ++i)
    moved |= continue_run(pending[i].region_index, pending[i].run, OnHole::kWake);
  return moved;
}

/// False: deferred, or the session has failed.
bool Publisher::continue_run(uint32_t region_index, PageRun run, OnHole on_hole) {
  const FilledRegion& region = core_.region(region_index);
  const uint64_t page_bytes = region.page_bytes();
  const uint64_t step_bytes = kernel_page_bytes(region);
  return each_piece(region_index, run, [&](const Piece& piece, PageIndex first) {
    uint64_t at = 0;
    while (at < piece.length_bytes) {
      const RangeOutcome result = uffd::continue_range(piece.uffd, piece.base + at, piece.length_bytes - at);
      at += result.done_bytes;
      const Piece stopper{piece.uffd, piece.base + at, step_bytes};
      switch (result.outcome) {
        case Outcome::kDone:
          return true;
        case Outcome::kExists:
          // Mapped by the other thread a moment ago, or through a second mapping of the region. A waiter may
          // have missed that wake.
          wake(stopper);
          at += step_bytes;
          break;
        case Outcome::kNoPage:
          // The VM discarded the page meanwhile.
          if (on_hole == OnHole::kWake) {
            wake(stopper);
          } else if (!zero_piece(region_index, raw(first) * page_bytes + at, stopper, step_bytes)) {
            return false;
          }
          at += step_bytes;
          break;
        case Outcome::kAgain: {
          const uint64_t page = raw(first) + at / page_bytes;
          defer(region_index, PageRun{PageIndex{page}, raw(run.first) + run.count - page});
          return false;
        }
        default:
          core_.fail(uffd::call_error(result.system_errno, "UFFDIO_CONTINUE"));
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
  core_.fill().add_present(run.count);
}

Status Publisher::open() {
  if (core_.tags() == nullptr) return ok();
  auto writer = core_.tags()->writer();
  if (!writer) return writer.error();
  tags_ = std::move(writer).value();
  return ok();
}

void Publisher::publish(uint32_t region_index, PageRun run) {
  inject_point(wire::InjectPoint::kTargetBeforePublish, page_key(region_index, run.first));
  // Before the state: a page that is present is never fetched again, so its tag must be there.
  if (tags_) {
    const Status noted = tags_->note(region_index, core_.region(region_index), run);
    if (!noted) return core_.fail(noted.error());
  }
  core_.region(region_index).presence->publish(run);
  const PageKey first = page_key(region_index, run.first);
  const PageKey wanted = run.count == 1 ? 0 : core_.waits.find(first, first + run.count);
  if (wanted > first) {
    // From the awaited page to the end, then the part before it: no page is continued twice.
    const uint64_t before = wanted - first;
    continue_run(region_index, PageRun{key_page(wanted), run.count - before}, OnHole::kWake);
    continue_run(region_index, PageRun{run.first, before}, OnHole::kWake);
  } else {
    continue_run(region_index, run, OnHole::kWake);
  }
  account(region_index, run);
}

void Publisher::serve_present(uint32_t region_index, PageIndex page) {
  continue_run(region_index, PageRun{page, 1}, OnHole::kZero);
  if (core_.has_fetched_ahead()) show_after(region_index, page);
}

/// The pages behind one that was fetched ahead are probably not mapped either. The kernel maps up to the
/// first that is; a page that it cannot map now will fault.
void Publisher::show_after(uint32_t region_index, PageIndex page) {
  const FilledRegion& region = core_.region(region_index);
  const PageIndex next{raw(page) + 1};
  const uint64_t count =
      present_from(region, next, std::max<uint64_t>(1, kZeroBatchBytes / region.page_bytes()));
  if (count == 0) return;
  each_piece(region_index, PageRun{next, count}, [](const Piece& piece, PageIndex) {
    static_cast<void>(uffd::continue_range(piece.uffd, piece.base, piece.length_bytes));
    return true;
  });
}

bool Publisher::show_some() {
  if (!core_.has_fetched_ahead()) return false;
  while (shown_region_ < core_.fill().regions().size()) {
    const FilledRegion& region = core_.region(shown_region_);
    if (shown_page_ == region.page_count()) {
      ++shown_region_;
      shown_page_ = 0;
      continue;
    }
    // A run may be deferred, and needs a place then.
    if (!has_room(1)) return false;
    const PageIndex first{shown_page_};
    const uint64_t count = present_from(region, first, region.pages_in(kShownBytes));
    shown_page_ += std::max<uint64_t>(1, count);
    if (count == 0) continue;
    continue_run(shown_region_, PageRun{first, count}, OnHole::kWake);
    return true;
  }
  return false;
}

/// hugetlbfs has no zero page: the kernel zeroes a page when it allocates it, and leaves an existing page as
/// it is.
bool Publisher::allocate_huge_page(const FilledRegion& region, uint64_t offset_bytes) {
  int rc;
  do {
    rc = ::fallocate(region.file->fd(), FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset_bytes),
                     static_cast<off_t>(region.page_bytes()));
  } while (rc != 0 && errno == EINTR);
  if (rc == 0) return true;
  core_.fail(errno == ENOMEM ? Error{ErrorCode::kNoSpace, ENOMEM, "fallocate huge page"}
                             : system_error("fallocate huge page"));
  return false;
}

/// Maps zeros, or the bytes that have reached the page cache meanwhile, to the first `needed_bytes` of the
/// piece, and to the rest as far as possible without a second call. False: deferred, or the session has
/// failed.
bool Publisher::zero_piece(uint32_t region_index, uint64_t offset_bytes, const Piece& piece,
                           uint64_t needed_bytes) {
  const FilledRegion& region = core_.region(region_index);
  const uint64_t step_bytes = kernel_page_bytes(region);
  uint64_t at = 0;
  while (at < needed_bytes) {
    if (region.hugetlbfs) {
      if (!allocate_huge_page(region, offset_bytes + at)) return false;
    } else {
      const RangeOutcome zeroed = uffd::zero_range(piece.uffd, piece.base + at, piece.length_bytes - at);
      at += zeroed.done_bytes;
      if (zeroed.outcome == Outcome::kDone || at >= needed_bytes) return true;
      if (zeroed.outcome == Outcome::kAgain) {
        // Making the kernel report the fault again needs no place in the list.
        wake(Piece{piece.uffd, piece.base + at, step_bytes});
        return false;
      }
      if (zeroed.outcome != Outcome::kExists) {
        // tmpfs returns ENOMEM when its size limit is reached.
        core_.fail(zeroed.outcome == Outcome::kNoMemory
                       ? Error{ErrorCode::kNoSpace, zeroed.system_errno, "UFFDIO_ZEROPAGE"}
                       : uffd::call_error(zeroed.system_errno, "UFFDIO_ZEROPAGE"));
        return false;
      }
    }
    // The page is in the page cache, mapped or not. If an RDMA device has filled the file, its neighbours are
    // too.
    inject_point(wire::InjectPoint::kTargetBeforePublish,
                 page_key(region_index, PageIndex{(offset_bytes + at) / region.page_bytes()}));
    const RangeOutcome mapped = uffd::continue_range(piece.uffd, piece.base + at, piece.length_bytes - at);
    at += mapped.done_bytes;
    if (mapped.done_bytes != 0) continue;
    switch (mapped.outcome) {
      case Outcome::kDone:
      case Outcome::kExists:
      case Outcome::kNoPage:
        // The page was mapped, or discarded again, a moment ago: the waiter must fault again.
        wake(Piece{piece.uffd, piece.base + at, step_bytes});
        break;
      case Outcome::kAgain:
        wake(Piece{piece.uffd, piece.base + at, step_bytes});
        return false;
      default:
        core_.fail(uffd::call_error(mapped.system_errno, "UFFDIO_CONTINUE"));
        return false;
    }
    at += step_bytes;
  }
  return true;
}

void Publisher::serve_zero(uint32_t region_index, PageIndex page) {
  const FilledRegion& region = core_.region(region_index);
  const uint64_t page_bytes = region.page_bytes();
  const uint64_t count_max = region.hugetlbfs ? 1 : std::max<uint64_t>(1, kZeroBatchBytes / page_bytes);
  uint64_t count = 1;
  while (count < count_max && raw(page) + count < region.presence->page_count() &&
         region.presence->state(PageIndex{raw(page) + count}) == wire::PageState::kZero) {
    ++count;
  }
  // The page that faulted. Its neighbours may wait for their own faults.
  each_piece(region_index, PageRun{page, count}, [&](const Piece& piece, PageIndex first) {
    return zero_piece(region_index, raw(first) * page_bytes, piece, first == page ? page_bytes : 0);
  });
}

}  // namespace vmigrate::pager
