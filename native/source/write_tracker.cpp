#include "source/write_tracker.hpp"

#include <fcntl.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <span>

#include "uffd/uffd.hpp"
#include "vm/process_file_error.hpp"

namespace vmigrate::pager {
namespace {

using uffd::Outcome;
using uffd::RangeOutcome;
using uffd::Stretch;

Stretch whole(const MappedRange& range) {
  return {range.base, range.length_bytes};
}

/// The kernel returns EAGAIN while the address space is being copied or moved, which takes a short time.
Status protect_stretch(int uffd, const Stretch& stretch) {
  for (;;) {
    const RangeOutcome result =
        uffd::write_protect_range(uffd, stretch.base, stretch.length_bytes, /*protect=*/true);
    if (result.outcome == Outcome::kDone) return ok();
    if (result.outcome != Outcome::kAgain)
      return uffd::call_error(result.system_errno, "UFFDIO_WRITEPROTECT");
    ::sched_yield();
  }
}

/// -1 if the VM's kernel has none.
int async_descriptor(const VmMemory& memory) {
  const auto found =
      std::find_if(memory.descriptors.begin(), memory.descriptors.end(),
                   [](const UffdDescriptor& each) { return each.kind == wire::PreloadDescriptor::kAsyncWp; });
  return found == memory.descriptors.end() ? -1 : found->fd.get();
}

}  // namespace

Result<std::unique_ptr<WriteTracker>> WriteTracker::start(const VmMemory& memory) {
  const int uffd = async_descriptor(memory);
  if (uffd < 0)
    return Error{ErrorCode::kUnsupported, 0, "the VM has no descriptor for asynchronous write-protection"};
  std::unique_ptr<WriteTracker> tracker(new WriteTracker(memory, uffd));
  char path[48];
  std::snprintf(path, sizeof path, "/proc/%d/pagemap", static_cast<int>(memory.pid));
  tracker->page_map_.reset(::open(path, O_RDONLY | O_CLOEXEC));
  if (!tracker->page_map_.valid()) return process_file_error("open /proc/PID/pagemap");
  for (const MappedRange& range : memory.ranges) {
    const RangeOutcome registered = uffd::register_range(tracker->uffd_, range.base, range.length_bytes,
                                                         static_cast<uint64_t>(uffd::Mode::kWriteProtect));
    if (registered.outcome == Outcome::kInvalid)
      return Error{ErrorCode::kUnsupported, registered.system_errno, "tracking of writes"};
    if (registered.outcome != Outcome::kDone)
      return uffd::call_error(registered.system_errno, "UFFDIO_REGISTER");
    ++tracker->registered_count_;
    if (auto status = protect_stretch(tracker->uffd_, whole(range)); !status) return status.error();
  }
  return tracker;
}

void WriteTracker::release(const VmMemory& memory) {
  const int uffd = async_descriptor(memory);
  for (const MappedRange& range : memory.ranges)
    if (uffd >= 0) static_cast<void>(uffd::unregister_range(uffd, range.base, range.length_bytes));
}

WriteTracker::~WriteTracker() {
  // A process that has ended has nothing protected.
  for (const MappedRange& range : std::span(memory_.ranges).first(registered_count_))
    static_cast<void>(uffd::unregister_range(uffd_, range.base, range.length_bytes));
}

/// A page that is not visited was protected already when the first scan came to it, and still is when the
/// second one does: nobody has written to it in between, because a write takes the protection away. A page
/// that is written between the scans is visited by the second.
Status WriteTracker::take(const Visit& visit) {
  for (const MappedRange& range : memory_.ranges) {
    const Status protected_now =
        uffd::protect_written(page_map_.get(), whole(range), [&](const Stretch& written) {
          visit(range.region_index, range.region_offset_bytes + (raw(written.base) - raw(range.base)),
                written.length_bytes);
        });
    if (!protected_now) return protected_now;
    if (auto status = visit_unprotected(range, visit, /*protect=*/true); !status) return status;
  }
  return ok();
}

Status WriteTracker::take_last(const Visit& visit) const {
  for (const MappedRange& range : memory_.ranges)
    if (auto status = visit_unprotected(range, visit, /*protect=*/false); !status) return status;
  return ok();
}

/// With `protect`, what has no entry gets a marker: without one, it would count as written for ever. What is
/// protected here is visited, so a write that came before does not get lost.
Status WriteTracker::visit_unprotected(const MappedRange& range, const Visit& visit, bool protect) const {
  Status done = ok();
  HostAddr at = range.base;
  const auto visit_gap = [&](HostAddr end) {
    if (raw(at) >= raw(end) || !done) return;
    const uint64_t length_bytes = raw(end) - raw(at);
    visit(range.region_index, range.region_offset_bytes + (raw(at) - raw(range.base)), length_bytes);
    if (protect) done = protect_stretch(uffd_, {at, length_bytes});
  };
  const Status scanned = uffd::each_protected(page_map_.get(), whole(range), [&](const Stretch& stretch) {
    visit_gap(stretch.base);
    at = stretch.base + stretch.length_bytes;
  });
  if (!scanned) return scanned;
  visit_gap(range.base + range.length_bytes);
  return done;
}

}  // namespace vmigrate::pager
