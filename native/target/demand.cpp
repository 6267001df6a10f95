#include "target/demand.hpp"

#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>

#include "base/inject_point.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

using wire::PageState;

DemandThread::DemandThread(TargetCore& core)
    : core_(core), publisher_(core), lane_(core.fetch(), publisher_, *this, /*tag=*/0, /*spins=*/true) {}

Status DemandThread::open() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return system_error("epoll_create1");
  if (auto status = publisher_.open(); !status) return status;
  if (auto status = watch(core_.demand_wake.fd(), 0); !status) return status;
  for (const MappedRange& range : core_.vm().ranges) {
    if (std::find(descriptors_.begin(), descriptors_.end(), range.descriptor_index) != descriptors_.end()) {
      continue;
    }
    descriptors_.push_back(range.descriptor_index);
    const int uffd = core_.vm().descriptors[range.descriptor_index].fd.get();
    if (auto status = watch(uffd, 0); !status) return status;
  }
  return ok();
}

/// Everything is looked at after each sleep, so no tag is needed.
Status DemandThread::watch(int fd, uint32_t /*tag*/) {
  epoll_event event{};
  event.events = EPOLLIN;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0 ? ok() : Status(system_error("epoll_ctl"));
}

void DemandThread::unwatch(int fd) {
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr) != 0) core_.fail(system_error("epoll_ctl"));
}

/// How many faults may be read without overflowing any table, whatever kind they are.
bool DemandThread::room_for_faults(size_t& count_max) const {
  const size_t waits = core_.waits.count();
  const size_t fetch_room = lane_.free_count();
  const size_t wait_room = waits < kWaitingFaultsMax ? kWaitingFaultsMax - waits : 0;
  const size_t retry_used = publisher_.retry_count() + lane_.used_count();
  const size_t retry_room = retry_used < kRetriesMax ? kRetriesMax - retry_used : 0;
  count_max = std::min({kFaultBatchMax, fetch_room, wait_room, retry_room});
  return count_max != 0;
}

bool DemandThread::read_faults() {
  bool any = false;
  for (size_t i = 0; i < descriptors_.size(); ++i) {
    size_t count_max = 0;
    if (!room_for_faults(count_max)) break;
    const uint32_t index = descriptors_[(first_descriptor_ + i) % descriptors_.size()];
    std::array<uffd::FaultEvent, kFaultBatchMax> faults;
    const uffd::ReadOutcome read =
        uffd::read_faults(core_.vm().descriptors[index].fd.get(), {faults.data(), count_max});
    if (read.outcome != uffd::Outcome::kDone) {
      core_.fail(uffd::call_error(read.system_errno, "read(userfaultfd)"));
      return true;
    }
    if (read.count == 0) continue;
    any = true;
    const uint64_t read_ns = now_ns();
    core_.counters.fault_count.fetch_add(read.count, std::memory_order_relaxed);
    core_.fetch().last_fault_ns.store(read_ns, std::memory_order_relaxed);
    for (size_t fault = 0; fault < read.count; ++fault) {
      const auto key = core_.locate(index, faults[fault].address);
      if (!key || faults[fault].is_write_protect) {
        // This address is not ours to resolve, and ignoring it would hang a vCPU in silence.
        core_.fail({ErrorCode::kInvalidArgument, 0, "fault outside the registered regions"});
        return true;
      }
      inject_point(wire::InjectPoint::kTargetFaultRead, *key);
      serve(*key, read_ns);
    }
    if (lane_.has_unposted()) lane_.post();
  }
  first_descriptor_ = (first_descriptor_ + 1) % descriptors_.size();
  return any;
}

void DemandThread::serve(PageKey key, uint64_t read_ns) {
  const uint32_t region_index = key_region(key);
  const PageIndex page = key_page(key);
  memory::PresenceMap& presence = *core_.region(region_index).presence;
  core_.fetch().recent_faults.push(key);
  // States only move forward, so this loop ends: an absent page may go to another claim or to zero, a claimed
  // page to present.
  for (;;) {
    switch (presence.state(page)) {
      case PageState::kPresent:
        publisher_.serve_present(region_index, page);
        core_.stats.record(read_ns, now_ns());
        return;
      case PageState::kZero:
        publisher_.serve_zero(region_index, page);
        core_.stats.record(read_ns, now_ns());
        return;
      case PageState::kAbsent:
        if (!presence.claim(page)) break;
        inject_point(wire::InjectPoint::kTargetClaimed, key);
        core_.waits.insert(key, read_ns);
        lane_.start(region_index, PageRun{page, 1});
        return;
      case PageState::kClaimed:
        core_.counters.fault_on_claimed_count.fetch_add(1, std::memory_order_relaxed);
        if (wait_for_claim(key, read_ns)) return;
        break;
    }
  }
}

/// Another fetch has the page: its publisher continues and wakes. False: the page has become present
/// meanwhile, and the caller must handle the wait.
bool DemandThread::wait_for_claim(PageKey key, uint64_t read_ns) {
  core_.waits.insert(key, read_ns);
  // F2 pairs with F1 in Publisher::account: the wait stored before, the state looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (core_.region(key_region(key)).presence->state(key_page(key)) == PageState::kClaimed) return true;
  // The thread that removes the wait must answer it. If the publisher removed it, it did so after its
  // CONTINUE.
  bool taken = false;
  core_.waits.resolve(key, key + 1, [&](uint64_t) { taken = true; });
  return !taken;
}

}  // namespace vmigrate::pager
