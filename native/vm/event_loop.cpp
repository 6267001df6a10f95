#include "vm/event_loop.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "base/check.hpp"

namespace vmigrate::pager {

namespace {
constexpr EventLoop::WatchId kWake = 0;
}

Result<std::shared_ptr<EventLoop>> EventLoop::shared() {
  static std::mutex creation;
  static std::weak_ptr<EventLoop> current;
  std::lock_guard lock(creation);
  if (auto loop = current.lock()) return loop;
  UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll.valid()) return system_error("epoll_create1");
  UniqueFd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return system_error("eventfd");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWake;
  if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) != 0) return system_error("epoll_ctl");
  std::shared_ptr<EventLoop> loop(new EventLoop(std::move(epoll), std::move(wake)));
  current = loop;
  return loop;
}

EventLoop::EventLoop(UniqueFd epoll, UniqueFd wake) : epoll_(std::move(epoll)), wake_(std::move(wake)) {
  // Signals belong to the threads of the program that loaded this library.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "vmg-preload");
}

EventLoop::~EventLoop() {
  const uint64_t one = 1;
  VMG_CHECK(::write(wake_.get(), &one, sizeof one) == sizeof one);
  thread_.join();
}

Result<EventLoop::WatchId> EventLoop::watch(int fd, Handler handler) {
  std::lock_guard lock(mutex_);
  const WatchId id = next_id_++;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = id;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return system_error("epoll_ctl");
  watches_.emplace(id, Watch{fd, std::make_shared<Handler>(std::move(handler))});
  return id;
}

void EventLoop::unwatch(WatchId id) {
  std::lock_guard lock(mutex_);
  const auto found = watches_.find(id);
  if (found == watches_.end()) return;
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
  watches_.erase(found);
}

void EventLoop::run() {
  for (;;) {
    epoll_event event{};
    const int count = epoll_wait(epoll_.get(), &event, 1, -1);
    if (count < 0 && errno == EINTR) continue;
    VMG_CHECK(count == 1);
    // A copy: the member is not aligned, so no reference may be bound to it.
    const WatchId id = event.data.u64;
    if (id == kWake) return;
    std::lock_guard lock(mutex_);
    const auto found = watches_.find(id);
    if (found == watches_.end()) continue;
    // Holds a reference of our own, because the handler may remove its watch.
    const std::shared_ptr<Handler> handler = found->second.handler;
    (*handler)();
  }
}

}  // namespace vmigrate::pager
