#include "image/parent/supply.hpp"

#include <array>

#include "base/inject_point.hpp"
#include "uffd/uffd.hpp"
#include "vm/fit.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using wire::InjectPoint;
using wire::PageState;

ParentSupply::ParentSupply(ParentMemory& memory, ParentGuard& guard)
    : memory_(memory),
      core_(memory.core()),
      guard_(guard),
      copier_(memory, guard, InjectPoint::kImageClaimed),
      waits_(memory.core()) {}

/// The tag of a descriptor is its index in VmMemory::descriptors.
Status ParentSupply::open(Watcher& watcher) {
  if (memory_.vm() == nullptr) return ok();
  const auto& descriptors = memory_.vm()->descriptors;
  for (uint32_t i = 0; i < descriptors.size(); ++i) {
    if (descriptors[i].kind != wire::PreloadDescriptor::kSync) continue;
    if (auto status = watcher.watch(descriptors[i].fd.get(), i); !status) return status;
  }
  return ok();
}

void ParentSupply::begin() {
  if (core_.resume()) guard_.wake_all();
}

Status ParentSupply::begin_copying() {
  is_copying_ = true;
  return ok();
}

Supply::Answer ParentSupply::want(uint32_t region_index, PageIndex page) {
  return copier_.fill(region_index, core_.cluster(region_index, page)) ? Answer::kHere : Answer::kFailed;
}

bool ParentSupply::has_ended() const {
  // A13 pairs with R13 in SweepThread::run: every ioctl of the sweep comes before what is done now.
  return memory_.sweep_ended.load(std::memory_order_acquire);
}

/// Readers on behalf of other hosts release pages of the parent too, and must not do so when another capture
/// has begun to protect it.
void ParentSupply::let_go() {
  memory_.bar();
  guard_.let_go();
}

void ParentSupply::step() {
  if (!waits_.empty())
    waits_.serve_ready([this](const WaitList::Wait& wait) { serve(wait.key, wait.read_ns); });
}

/// A parent that waits in silence would hang, so the capture fails if a fault cannot be answered.
void ParentSupply::on_ready(uint32_t tag) {
  const VmMemory& parent = *memory_.vm();
  std::array<uffd::FaultEvent, kImageFaultBatchMax> faults;
  const uffd::ReadOutcome read = uffd::read_faults(parent.descriptors[tag].fd.get(), faults);
  const uint64_t read_ns = now_ns();
  if (read.outcome != Outcome::kDone)
    return core_.fail(uffd::call_error(read.system_errno, "read(userfaultfd)"));
  for (size_t i = 0; i < read.count; ++i) {
    const uffd::FaultEvent& fault = faults[i];
    const MappedRange* range = find_range(parent, tag, fault.address);
    // This address is not ours to resolve.
    if (range == nullptr || !fault.is_write_protect)
      return core_.fail({ErrorCode::kInvalidArgument, 0, "fault outside the protected regions"});
    const PageKey key = key_in(*range, fault.address, memory_.page_bytes(range->region_index));
    inject_point(InjectPoint::kImageFaultRead, key);
    if (!is_copying_) {
      memory_.counters.noted_fault_count.fetch_add(1, std::memory_order_relaxed);
      guard_.let_write(*range, fault.address);
    } else {
      memory_.counters.parent_fault_count.fetch_add(1, std::memory_order_relaxed);
      serve(key, read_ns);
    }
  }
}

void ParentSupply::serve(PageKey key, uint64_t read_ns) {
  const uint32_t region_index = key_region(key);
  const PageIndex page = key_page(key);
  bool is_released = false;
  // States only move forward, so this loop ends: an absent page may go to a claim of the sweep, or to zero.
  for (;;) {
    switch (core_.region(region_index).presence->state(page)) {
      case PageState::kPresent:
      case PageState::kZero:
        if (!is_released) guard_.release(region_index, PageRun{page, 1});
        memory_.stats.record(read_ns, now_ns());
        return;
      case PageState::kAbsent:
        if (want(region_index, page) == Answer::kFailed) return;
        is_released = core_.region(region_index).presence->state(page) != PageState::kClaimed;
        break;
      case PageState::kClaimed:
        // The sweep has the page. It allows the write by itself.
        if (waits_.add({0, key, read_ns}, PageState::kClaimed)) return;
        break;
    }
  }
}

}  // namespace vmigrate::pager
