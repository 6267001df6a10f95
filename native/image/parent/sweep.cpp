#include "image/parent/sweep.hpp"

#include <algorithm>

#include "image/serve/limits.hpp"

namespace vmigrate::pager {

SweepThread::SweepThread(ParentMemory& memory, ParentGuard& guard)
    : memory_(memory), core_(memory.core()), copier_(memory, guard, wire::InjectPoint::kImageSweepClaimed) {}

void SweepThread::run() {
  // Lower priority than the fault thread, higher than other work: the parent is degraded until this thread is
  // done.
  set_up_thread("vmg-imgcopy", -5);
  for (uint32_t i = 0; i < core_.fill().regions().size(); ++i) {
    if (!sweep_region(i)) break;
  }
  memory_.counters.sweep_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  // R13 pairs with A13 in ParentSupply::has_ended.
  memory_.sweep_ended.store(true, std::memory_order_release);
  core_.serve_wake.signal();
}

/// Pages that the other thread has claimed are left to that thread and not checked again.
bool SweepThread::sweep_region(uint32_t region_index) {
  const FilledRegion& region = core_.region(region_index);
  const uint64_t page_count = region.presence->page_count();
  const uint64_t chunk_pages = region.pages_in(kImageChunkBytes);
  for (uint64_t page = 0;;) {
    page = raw(region.presence->next_absent(PageIndex{page}));
    if (page == page_count) return true;
    if (core_.must_stop() != ImageCore::Stop::kNone) return false;
    const uint64_t count = std::min(chunk_pages - page % chunk_pages, page_count - page);
    if (!copier_.fill(region_index, PageRun{PageIndex{page}, count})) return false;
    page += count;
    memory_.counters.sweep_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  }
}

}  // namespace vmigrate::pager
