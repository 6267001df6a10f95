#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/result.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::pager {

/// One thread that watches the control descriptors of all preload listeners of this process. It sleeps in
/// epoll_wait when nothing happens and ends with its last user. Not for the page path. Thread-safe.
class EventLoop {
 public:
  using Handler = std::function<void()>;
  using WatchId = uint64_t;

  /// Returns the process's loop and starts it if there is none.
  static Result<std::shared_ptr<EventLoop>> shared();
  /// Must not be called from a handler.
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  /// Calls `handler` on the loop's thread whenever `fd` is readable or hung up (level-triggered). `fd` stays
  /// open until the watch is removed.
  Result<WatchId> watch(int fd, Handler handler);
  /// After this call the handler is not running and does not run again. Called from inside a handler, it only
  /// guarantees that the handler does not run again. An id of 0 or an unknown id has no effect.
  void unwatch(WatchId id);
  /// While the caller holds this, no handler runs.
  [[nodiscard]] std::unique_lock<std::recursive_mutex> pause() { return std::unique_lock(mutex_); }

 private:
  EventLoop(UniqueFd epoll, UniqueFd wake);
  void run();

  UniqueFd epoll_;
  UniqueFd wake_;
  /// Held while a handler runs, so that unwatch() can guarantee that no handler is running. It is recursive
  /// because handlers call watch and unwatch.
  std::recursive_mutex mutex_;
  struct Watch {
    int fd;
    std::shared_ptr<Handler> handler;
  };
  /// Events carry an id, not a pointer: an event that was read just before its watch was removed finds no
  /// watch.
  std::map<WatchId, Watch> watches_;
  WatchId next_id_ = 1;
  std::thread thread_;
};

}  // namespace vmigrate::pager
