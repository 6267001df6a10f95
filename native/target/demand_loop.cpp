// The demand thread's loop, its sleep and its end. demand.cpp handles the faults.

#include <sched.h>
#include <sys/epoll.h>

#include "base/spin.hpp"
#include "target/demand.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

void DemandThread::run() {
  set_up_thread("vmg-demand", -10);
  if (core_.resume()) {
    // Makes the kernel report again the faults that an earlier process had read and not answered.
    for (const MappedRange& range : core_.vm().ranges) {
      const auto result = uffd::wake_range(core_.vm().descriptors[range.descriptor_index].fd.get(),
                                           range.base, range.length_bytes);
      if (result.outcome != uffd::Outcome::kDone) {
        core_.fail(uffd::call_error(result.system_errno, "UFFDIO_WAKE"));
      }
    }
  }
  core_.notify();

  uint64_t last_work_ns = now_ns();
  bool spun = false;
  while (!core_.must_end()) {
    // A8 pairs with R8 in BulkThread::run: the bulk thread touches no range any more.
    if (core_.fill().all_done() && core_.fetch().bulk_ended.load(std::memory_order_acquire)) {
      finish();
      break;
    }
    lane_.drop_lost_link();
    bool worked = lane_.take_new_link();
    worked |= publisher_.retry_count() != 0 && publisher_.retry();
    worked |= lane_.poll();
    worked |= read_faults();
    // Posts again the operations that the transport did not accept before, whatever the reason.
    if (lane_.has_unposted()) lane_.post();
    const uint64_t at_ns = now_ns();
    if (worked) {
      if (spun) spin_ns_ = std::min(spin_ns_ * 2, kSpinNsMax);
      last_work_ns = at_ns;
      spun = false;
      device_spin_.succeed();
      continue;
    }
    if (lane_.awaits_device() && device_spin_.go_on()) {
      if (poll_some())
        last_work_ns = now_ns();
      else
        ::sched_yield();
      continue;
    }
    if (at_ns - last_work_ns < (may_spin() ? spin_ns_ : kSpinNsMin)) {
      spun = true;
      // There may be only two cores, and the work that we look for may need this one.
      ::sched_yield();
      continue;
    }
    if (spun) spin_ns_ = std::max(spin_ns_ / 2, kSpinNsMin);
    spun = false;
    sleep();
    last_work_ns = now_ns();
  }
  lane_.close();
  core_.counters.demand_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
}

/// Polls the device a few times. That costs little compared with looking for the faults of other vCPUs, which
/// is a system call.
bool DemandThread::poll_some() {
  for (int i = 0; i < kPollsPerLook; ++i) {
    if (lane_.poll()) return true;
  }
  return false;
}

/// Everything polled here is level-triggered, so an event since the last look is not missed.
void DemandThread::sleep() {
  core_.counters.demand_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  size_t room = 0;
  pause_reading(!room_for_faults(room));
  lane_.stop_polling();
  std::array<epoll_event, 4> events;
  // connect() signals a new connection.
  const bool posts_soon = lane_.connected() && lane_.has_unposted();
  const int timeout_ms = publisher_.retry_count() != 0 || posts_soon ? kRetryMs : -1;
  const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), timeout_ms);
  if (count < 0 && errno != EINTR) core_.fail(system_error("epoll_wait"));
  core_.demand_wake.drain();
}

/// While no table has room the faults stay in the kernel, and a readable userfaultfd must not keep us from
/// sleeping.
void DemandThread::pause_reading(bool paused) {
  if (paused) {
    // F4 pairs with F3 in Publisher::account: the flag set before, the count looked at after. Either we see
    // the room or the bulk thread sees the flag. The fetches and retries that could also make room belong to
    // this thread.
    core_.reading_paused.store(true, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    size_t room = 0;
    paused = !room_for_faults(room);
  }
  if (!paused) core_.reading_paused.store(false, std::memory_order_relaxed);
  if (paused == reading_paused_) return;
  reading_paused_ = paused;
  epoll_event event{};
  if (!paused) event.events = EPOLLIN;
  for (const uint32_t index : descriptors_) {
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, core_.vm().descriptors[index].fd.get(), &event) != 0) {
      core_.fail(system_error("epoll_ctl"));
    }
  }
}

/// Every page is present or zero and this thread is the last: from here on the kernel resolves faults itself,
/// from the page cache or with zeros.
void DemandThread::finish() {
  for (const MappedRange& range : core_.vm().ranges) {
    const int uffd = core_.vm().descriptors[range.descriptor_index].fd.get();
    const auto unregistered = uffd::unregister_range(uffd, range.base, range.length_bytes);
    if (unregistered.outcome != uffd::Outcome::kDone) {
      return core_.fail(uffd::call_error(unregistered.system_errno, "UFFDIO_UNREGISTER"));
    }
    // Unregistering wakes before it removes the range; this wakes a vCPU that begins to wait in between.
    const auto woken = uffd::wake_range(uffd, range.base, range.length_bytes);
    if (woken.outcome != uffd::Outcome::kDone) {
      return core_.fail(uffd::call_error(woken.system_errno, "UFFDIO_WAKE"));
    }
  }
  lane_.close();
  // A connection may be left that neither thread has taken, because all pages were here before it was needed.
  core_.fetch().end();
  core_.counters.demand_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  core_.complete(now_ns());
}

}  // namespace vmigrate::pager
