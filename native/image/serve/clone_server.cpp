#include "image/faults.hpp"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>

#include "base/inject_point.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using wire::InjectPoint;
using wire::PageState;

namespace {

/// The data that epoll holds for a descriptor: the index of its process, and the descriptor's number within
/// it.
constexpr uint64_t kWakeEvent = UINT64_MAX;
constexpr size_t kEventsMax = 32;

constexpr uint64_t event_key(uint32_t faulter_index, uint32_t descriptor_index) {
  return uint64_t{faulter_index} << 32 | descriptor_index;
}

/// Visits each fault descriptor of the process once.
template <typename Visit>
void each_descriptor(const VmMemory& memory, Visit visit) {
  for (uint32_t i = 0; i < memory.descriptors.size(); ++i) {
    if (memory.descriptors[i].kind == wire::PreloadDescriptor::kSync) visit(i);
  }
}

}  // namespace

FaultThread::FaultThread(ImageCore& core, ParentGuard& guard)
    : core_(core),
      guard_(guard),
      mapper_(core),
      copier_(core, guard, InjectPoint::kImageClaimed),
      commands_(core.fault_wake) {}

Status FaultThread::open() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return system_error("epoll_create1");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeEvent;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, core_.fault_wake.fd(), &event) != 0) {
    return system_error("epoll_ctl");
  }
  if (core_.parent() == nullptr) return ok();
  faulters_.push_back({core_.parent(), /*is_parent=*/true});
  return watch(0);
}

Status FaultThread::watch(uint32_t faulter_index) {
  Faulter& faulter = faulters_[faulter_index];
  Status status = ok();
  each_descriptor(*faulter.memory, [&](uint32_t index) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = event_key(faulter_index, index);
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, faulter.memory->descriptors[index].fd.get(), &event) != 0) {
      status = system_error("epoll_ctl");
    }
  });
  faulter.is_watched = true;
  return status;
}

/// Serves a clone from now on. The kernel reports again the faults that an earlier process, or capture, had
/// read and not answered.
Status FaultThread::serve_clone(uint32_t faulter_index) {
  const VmMemory& clone = *faulters_[faulter_index].memory;
  for (const MappedRange& range : clone.ranges) {
    (void)uffd::wake_range(clone.descriptors[range.descriptor_index].fd.get(), range.base,
                           range.length_bytes);
  }
  return watch(faulter_index);
}

/// Stops reading the process's faults. Events that epoll has already returned for it have no effect.
void FaultThread::unwatch(uint32_t faulter_index) {
  Faulter& faulter = faulters_[faulter_index];
  if (!std::exchange(faulter.is_watched, false)) return;
  each_descriptor(*faulter.memory, [&](uint32_t index) {
    (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, faulter.memory->descriptors[index].fd.get(), nullptr);
  });
}

Status FaultThread::begin_copying() {
  is_copying_ = true;
  for (uint32_t i = 0; i < faulters_.size(); ++i) {
    const Faulter& faulter = faulters_[i];
    if (faulter.memory == nullptr || faulter.is_watched) continue;
    if (auto status = serve_clone(i); !status) return status;
  }
  return ok();
}

Status FaultThread::add_clone(const VmMemory& clone) {
  if (auto status = check_vm_fits(clone, core_.geometry()); !status) return status;
  const auto known = std::find_if(faulters_.begin(), faulters_.end(),
                                  [&](const Faulter& faulter) { return faulter.memory == &clone; });
  if (known != faulters_.end()) return Error{ErrorCode::kAlreadyExists, 0, "the clone is served already"};
  if (core_.state() == ImageState::kComplete) {
    mapper_.let_go(clone);
    return ok();
  }
  auto slot = std::find_if(faulters_.begin(), faulters_.end(),
                           [](const Faulter& faulter) { return faulter.memory == nullptr; });
  if (slot == faulters_.end()) {
    if (faulters_.size() == kImageClonesMax) {
      return Error{ErrorCode::kInvalidArgument, 0, "number of clones of one image"};
    }
    slot = faulters_.insert(faulters_.end(), Faulter{});
  }
  *slot = {&clone};
  if (!is_copying_) return ok();
  return serve_clone(static_cast<uint32_t>(slot - faulters_.begin()));
}

void FaultThread::remove_clone(const VmMemory& clone) {
  for (uint32_t i = 0; i < faulters_.size(); ++i) {
    if (faulters_[i].memory != &clone || faulters_[i].is_parent) continue;
    unwatch(i);
    faulters_[i] = {};
    const auto end = waits_.begin() + static_cast<std::ptrdiff_t>(wait_count_);
    wait_count_ = static_cast<size_t>(
        std::remove_if(waits_.begin(), end, [i](const Wait& wait) { return wait.faulter_index == i; }) -
        waits_.begin());
    core_.wait_count.store(wait_count_, std::memory_order_relaxed);
  }
}

void FaultThread::run() {
  set_up_thread("vmg-image", -10);
  if (core_.resume()) guard_.wake_all();
  while (must_go_on()) {
    if (wait_count_ != 0) serve_waits();
    sleep_and_read();
  }
  if (core_.must_stop() == ImageCore::Stop::kLetGo) guard_.let_go();
  // When a capture is seen complete, its counters no longer change.
  if (core_.state() != ImageState::kComplete)
    core_.counters.fault_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  commands_.end();
}

/// The sweep touches the parent until it has ended, so no process is released before that.
bool FaultThread::must_go_on() {
  const ImageCore::Stop stop = core_.must_stop();
  if (stop == ImageCore::Stop::kLeave) return false;
  // A13 pairs with R13 in SweepThread::run: every ioctl of the sweep comes before what is done now.
  if (!core_.sweep_ended.load(std::memory_order_acquire)) return true;
  if (stop == ImageCore::Stop::kLetGo) return false;
  if (!is_copying_ || !core_.all_done()) return true;
  finish();
  return false;
}

/// Every page is in the image and this thread is the last. From here on the kernel serves all processes, with
/// zeros where the files have a hole.
void FaultThread::finish() {
  inject_point(InjectPoint::kImageFinish);
  serve_waits();
  if (const Status whole = core_.check_image_files(); !whole) {
    core_.fail(whole.error());
    return;
  }
  guard_.let_go();
  for (const Faulter& faulter : faulters_) {
    if (faulter.memory != nullptr && !faulter.is_parent) mapper_.let_go(*faulter.memory);
  }
  core_.counters.fault_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  core_.complete();
}

/// Everything polled here is level-triggered, so an event since the last look is not missed.
void FaultThread::sleep_and_read() {
  core_.counters.fault_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  const bool is_full = wait_count_ + kImageFaultBatchMax > waits_.size();
  if (is_full || core_.must_stop() != ImageCore::Stop::kNone) {
    // No fault may be read. The sweep signals when that changes, or when it ends.
    pollfd wake{.fd = core_.fault_wake.fd(), .events = POLLIN, .revents = 0};
    if (::poll(&wake, 1, -1) > 0) core_.fault_wake.drain();
    commands_.serve();
    return;
  }
  std::array<epoll_event, kEventsMax> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), -1);
  if (count < 0 && errno != EINTR) core_.fail(system_error("epoll_wait"));
  bool is_woken = false;
  for (int i = 0; i < count; ++i) {
    const uint64_t key = events[static_cast<size_t>(i)].data.u64;
    if (key == kWakeEvent) {
      is_woken = true;
      continue;
    }
    if (wait_count_ + kImageFaultBatchMax > waits_.size()) break;
    read_faults(static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key));
  }
  // This comes last, because a call may remove a process that the events above name.
  if (!is_woken) return;
  core_.fault_wake.drain();
  commands_.serve();
}

const MappedRange* FaultThread::locate(const VmMemory& memory, uint32_t descriptor_index,
                                       HostAddr address) const {
  for (const MappedRange& range : memory.ranges) {
    if (range.descriptor_index == descriptor_index && raw(address) >= raw(range.base) &&
        raw(address) - raw(range.base) < range.length_bytes) {
      return &range;
    }
  }
  return nullptr;
}

void FaultThread::read_faults(uint32_t faulter_index, uint32_t descriptor_index) {
  const Faulter& faulter = faulters_[faulter_index];
  if (!faulter.is_watched) return;
  std::array<uffd::FaultEvent, kImageFaultBatchMax> faults;
  const uffd::ReadOutcome read =
      uffd::read_faults(faulter.memory->descriptors[descriptor_index].fd.get(), faults);
  const uint64_t read_ns = now_ns();
  if (read.outcome != Outcome::kDone) {
    return give_up_on(faulter_index, uffd::call_error(read.system_errno, "read(userfaultfd)"));
  }
  bool is_good = true;
  for (size_t i = 0; i < read.count && is_good; ++i) {
    const uffd::FaultEvent& fault = faults[i];
    const MappedRange* range = locate(*faulter.memory, descriptor_index, fault.address);
    is_good = range != nullptr && fault.is_write_protect == faulter.is_parent;
    if (!is_good) break;
    const uint64_t offset_bytes = range->region_offset_bytes + (raw(fault.address) - raw(range->base));
    const PageKey key = page_key(range->region_index,
                                 PageIndex{offset_bytes / core_.regions()[range->region_index].page_bytes()});
    inject_point(InjectPoint::kImageFaultRead, key);
    if (!is_copying_) {
      core_.counters.noted_fault_count.fetch_add(1, std::memory_order_relaxed);
      guard_.let_write(*range, fault.address);
    } else {
      auto& counter =
          faulter.is_parent ? core_.counters.parent_fault_count : core_.counters.clone_fault_count;
      counter.fetch_add(1, std::memory_order_relaxed);
      serve(faulter_index, key, read_ns);
    }
  }
  // This address is not ours to resolve.
  if (!is_good)
    give_up_on(faulter_index, {ErrorCode::kInvalidArgument, 0, "fault outside the protected regions"});
}

/// A parent that waits in silence would hang, so the capture fails. A clone harms only itself.
void FaultThread::give_up_on(uint32_t faulter_index, const Error& error) {
  if (faulters_[faulter_index].is_parent) {
    core_.fail(error);
  } else {
    unwatch(faulter_index);
  }
}

void FaultThread::serve(uint32_t faulter_index, PageKey key, uint64_t read_ns) {
  const Faulter& faulter = faulters_[faulter_index];
  const uint32_t region_index = key_region(key);
  const PageIndex page = key_page(key);
  ImageRegion& region = core_.regions()[region_index];
  bool is_released = false;
  // States only move forward, so this loop ends: an absent page may go to a claim of the sweep, or to zero.
  for (;;) {
    const PageState state = region.presence->state(page);
    switch (state) {
      case PageState::kPresent:
      case PageState::kZero:
        if (!faulter.is_parent) {
          if (state == PageState::kPresent) mapper_.map_present(*faulter.memory, region_index, page);
          if (state == PageState::kZero) mapper_.map_zero(*faulter.memory, region_index, page);
        } else if (!is_released) {
          guard_.release(region_index, PageRun{page, 1});
        }
        (faulter.is_parent ? core_.parent_stats : core_.clone_stats).record(read_ns, now_ns());
        return;
      case PageState::kAbsent:
        if (!copier_.fill(region_index, region.cluster(page))) return;
        is_released = region.presence->state(page) != PageState::kClaimed;
        break;
      case PageState::kClaimed:
        if (wait_for_sweep(faulter_index, key, read_ns)) return;
        break;
    }
  }
}

/// The sweep has the page. It allows the parent's write by itself, and signals this thread to check all
/// waiters here. False: the page has arrived meanwhile.
bool FaultThread::wait_for_sweep(uint32_t faulter_index, PageKey key, uint64_t read_ns) {
  waits_[wait_count_++] = {faulter_index, key, read_ns};
  core_.wait_count.store(wait_count_, std::memory_order_relaxed);
  // F12 pairs with F11 in ImageCopier::copy: the wait counted before, the state looked at after. Either we
  // see the page, or the sweep sees the wait.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (core_.regions()[key_region(key)].presence->state(key_page(key)) == PageState::kClaimed) return true;
  core_.wait_count.store(--wait_count_, std::memory_order_relaxed);
  return false;
}

void FaultThread::serve_waits() {
  const auto waiting = waits_;
  const size_t count = std::exchange(wait_count_, 0);
  core_.wait_count.store(0, std::memory_order_relaxed);
  for (size_t i = 0; i < count; ++i) {
    const Wait& wait = waiting[i];
    serve(wait.faulter_index, wait.key, wait.read_ns);
  }
}

}  // namespace vmigrate::pager
