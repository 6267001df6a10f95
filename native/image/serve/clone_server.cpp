#include "image/serve/clone_server.hpp"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>
#include <array>

#include "base/inject_point.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using wire::InjectPoint;
using wire::PageState;

namespace {

/// The data that epoll holds for a descriptor: the index of its clone, and the descriptor's number within it.
constexpr uint64_t kWakeEvent = UINT64_MAX;
/// In place of a clone's index: a descriptor of the supply, followed by its tag.
constexpr uint32_t kSupplyIndex = UINT32_MAX - 1;
constexpr size_t kEventsMax = 32;

constexpr uint64_t event_key(uint32_t index, uint32_t number) {
  return uint64_t{index} << 32 | number;
}

/// Visits each fault descriptor of the process once.
template <typename Visit>
void each_descriptor(const VmMemory& memory, Visit visit) {
  for (uint32_t i = 0; i < memory.descriptors.size(); ++i) {
    if (memory.descriptors[i].kind == wire::PreloadDescriptor::kSync) visit(i);
  }
}

}  // namespace

CloneServer::CloneServer(ImageCore& core, Supply& supply)
    : core_(core), supply_(supply), mapper_(core), waits_(core), commands_(core.serve_wake) {}

Status CloneServer::open() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return system_error("epoll_create1");
  if (auto status = add_descriptor(core_.serve_wake.fd(), kWakeEvent); !status) return status;
  return supply_.open(*this);
}

Status CloneServer::add_descriptor(int fd, uint64_t key) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = key;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0 ? ok() : Status(system_error("epoll_ctl"));
}

Status CloneServer::watch(int fd, uint32_t tag) {
  return add_descriptor(fd, event_key(kSupplyIndex, tag));
}

/// Events that epoll has returned already reach the supply once more.
void CloneServer::unwatch(int fd) {
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

/// Serves a clone from now on. The kernel reports again the faults that an earlier process, or session, had
/// read and not answered.
Status CloneServer::serve_clone(uint32_t clone_index) {
  Clone& clone = clones_[clone_index];
  for (const MappedRange& range : clone.memory->ranges) {
    (void)uffd::wake_range(clone.memory->descriptors[range.descriptor_index].fd.get(), range.base,
                           range.length_bytes);
  }
  Status status = ok();
  each_descriptor(*clone.memory, [&](uint32_t index) {
    auto added = add_descriptor(clone.memory->descriptors[index].fd.get(), event_key(clone_index, index));
    if (!added) status = added;
  });
  clone.is_watched = true;
  return status;
}

/// Stops reading the clone's faults. Events that epoll has already returned for it have no effect.
void CloneServer::ignore(uint32_t clone_index) {
  Clone& clone = clones_[clone_index];
  if (!std::exchange(clone.is_watched, false)) return;
  each_descriptor(*clone.memory, [&](uint32_t index) { unwatch(clone.memory->descriptors[index].fd.get()); });
}

Status CloneServer::begin_copying() {
  is_copying_ = true;
  if (auto status = supply_.begin_copying(); !status) return status;
  for (uint32_t i = 0; i < clones_.size(); ++i) {
    if (clones_[i].memory == nullptr || clones_[i].is_watched) continue;
    if (auto status = serve_clone(i); !status) return status;
  }
  return ok();
}

Status CloneServer::add_clone(const VmMemory& memory) {
  if (auto status = check_vm_fits(memory, core_.geometry()); !status) return status;
  const auto known = std::find_if(clones_.begin(), clones_.end(),
                                  [&](const Clone& clone) { return clone.memory == &memory; });
  if (known != clones_.end()) return Error{ErrorCode::kAlreadyExists, 0, "the clone is served already"};
  if (core_.state() == ImageState::kComplete) return release_vm(memory);
  auto slot = std::find_if(clones_.begin(), clones_.end(),
                           [](const Clone& clone) { return clone.memory == nullptr; });
  if (slot == clones_.end()) {
    if (clones_.size() == kImageClonesMax) {
      return Error{ErrorCode::kInvalidArgument, 0, "number of clones of one image"};
    }
    slot = clones_.insert(clones_.end(), Clone{});
  }
  *slot = {&memory};
  if (!is_copying_) return ok();
  const Status served = serve_clone(static_cast<uint32_t>(slot - clones_.begin()));
  if (!served) remove_clone(memory);
  return served;
}

void CloneServer::remove_clone(const VmMemory& memory) {
  for (uint32_t i = 0; i < clones_.size(); ++i) {
    if (clones_[i].memory != &memory) continue;
    ignore(i);
    clones_[i] = {};
    waits_.remove(i);
  }
}

void CloneServer::run() {
  set_up_thread("vmg-image", -10);
  supply_.begin();
  while (must_go_on()) {
    supply_.step();
    serve_waits();
    sleep_and_read(supply_.timeout_ms());
  }
  if (core_.must_stop() == ImageCore::Stop::kLetGo) supply_.let_go();
  // When an image is seen complete, its counters no longer change.
  if (core_.state() != ImageState::kComplete)
    core_.serve_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  commands_.end();
}

/// The supply's threads touch pages and processes until they have ended, so no process is released before
/// that.
bool CloneServer::must_go_on() {
  const ImageCore::Stop stop = core_.must_stop();
  if (stop == ImageCore::Stop::kLeave) return false;
  if (!supply_.has_ended()) return true;
  if (stop == ImageCore::Stop::kLetGo) return false;
  if (!is_copying_ || !core_.fill().all_done()) return true;
  finish();
  return false;
}

/// Every page is in the image and this thread is the last. From here on the kernel serves all processes, with
/// zeros where the files have a hole.
void CloneServer::finish() {
  inject_point(InjectPoint::kImageFinish);
  supply_.step();
  serve_waits();
  if (const Status whole = core_.fill().check_files(); !whole) {
    core_.fail(whole.error());
    return;
  }
  supply_.let_go();
  for (const Clone& clone : clones_) {
    if (clone.memory != nullptr) static_cast<void>(release_vm(*clone.memory));
  }
  core_.serve_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  core_.complete();
}

/// Everything polled here is level-triggered, so an event since the last look is not missed.
void CloneServer::sleep_and_read(int timeout_ms) {
  core_.serve_cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
  // Then nothing is polled any more, and what has arrived would keep this thread awake.
  const bool is_ending = core_.must_stop() != ImageCore::Stop::kNone;
  if (!waits_.has_room() || !supply_.has_room() || is_ending) {
    // No fault may be read. A publisher signals when that changes, or when it ends.
    const std::array<int, 2> completions = supply_.completion_fds();
    std::array<pollfd, 3> watched{{{.fd = core_.serve_wake.fd(), .events = POLLIN, .revents = 0},
                                   {.fd = is_ending ? -1 : completions[0], .events = POLLIN, .revents = 0},
                                   {.fd = is_ending ? -1 : completions[1], .events = POLLIN, .revents = 0}}};
    (void)::poll(watched.data(), watched.size(), timeout_ms);  // a negative descriptor is passed over
    core_.serve_wake.drain();
    commands_.serve();
    return;
  }
  std::array<epoll_event, kEventsMax> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), events.size(), timeout_ms);
  if (count < 0 && errno != EINTR) core_.fail(system_error("epoll_wait"));
  bool is_woken = false;
  for (int i = 0; i < count; ++i) {
    const uint64_t key = events[static_cast<size_t>(i)].data.u64;
    if (key == kWakeEvent) {
      is_woken = true;
      continue;
    }
    if (!waits_.has_room() || !supply_.has_room()) break;
    const auto index = static_cast<uint32_t>(key >> 32);
    if (index == kSupplyIndex)
      supply_.on_ready(static_cast<uint32_t>(key));
    else
      read_faults(index, static_cast<uint32_t>(key));
  }
  // This comes last, because a call may remove a process that the events above name.
  if (!is_woken) return;
  core_.serve_wake.drain();
  commands_.serve();
}

void CloneServer::read_faults(uint32_t clone_index, uint32_t descriptor_index) {
  const Clone& clone = clones_[clone_index];
  if (!clone.is_watched) return;
  std::array<uffd::FaultEvent, kImageFaultBatchMax> faults;
  const uffd::ReadOutcome read =
      uffd::read_faults(clone.memory->descriptors[descriptor_index].fd.get(), faults);
  const uint64_t read_ns = now_ns();
  // A clone harms only itself.
  if (read.outcome != Outcome::kDone) return ignore(clone_index);
  for (size_t i = 0; i < read.count; ++i) {
    const MappedRange* range = find_range(*clone.memory, descriptor_index, faults[i].address);
    // This address is not ours to resolve.
    if (range == nullptr || faults[i].is_write_protect) return ignore(clone_index);
    const PageKey key = key_in(*range, faults[i].address, core_.region(range->region_index).page_bytes());
    inject_point(InjectPoint::kImageFaultRead, key);
    core_.clone_fault_count.fetch_add(1, std::memory_order_relaxed);
    core_.touched().touch(range->region_index, key_page(key));
    supply_.on_fault(key, read_ns);
    serve(clone_index, key, read_ns);
  }
}

void CloneServer::serve_waits() {
  if (waits_.empty()) return;
  waits_.serve_ready([this](const WaitList::Wait& wait) { serve(wait.waiter, wait.key, wait.read_ns); });
}

void CloneServer::serve(uint32_t clone_index, PageKey key, uint64_t read_ns) {
  const VmMemory& clone = *clones_[clone_index].memory;
  const uint32_t region_index = key_region(key);
  const PageIndex page = key_page(key);
  // States move forward, but for the few claims that are given up, so this loop ends: an absent page may go
  // to a claim of another thread, or to zero.
  for (;;) {
    switch (core_.region(region_index).presence->state(page)) {
      case PageState::kPresent:
        mapper_.map_present(clone, region_index, page);
        core_.clone_stats.record(read_ns, now_ns());
        return;
      case PageState::kZero:
        mapper_.map_zero(clone, region_index, page);
        core_.clone_stats.record(read_ns, now_ns());
        return;
      case PageState::kAbsent:
        switch (supply_.want(region_index, page)) {
          case Supply::Answer::kHere:
            continue;
          case Supply::Answer::kLater:
            if (waits_.add({clone_index, key, read_ns}, PageState::kAbsent)) return;
            continue;
          case Supply::Answer::kFailed:
            return;
        }
        break;
      case PageState::kClaimed:
        if (waits_.add({clone_index, key, read_ns}, PageState::kClaimed)) return;
        break;
    }
  }
}

}  // namespace vmigrate::pager
