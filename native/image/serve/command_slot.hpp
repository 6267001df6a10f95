#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>

#include "base/thread_util.hpp"

namespace vmigrate::pager {

/// Runs calls of other threads on one thread, between that thread's own steps, so that a call never finds a
/// step half done. While that thread does not exist, the caller runs its call itself. Not for the page path.
class CommandSlot {
 public:
  /// `wake` makes the serving thread check this slot.
  explicit CommandSlot(const WakeEvent& wake) : wake_(wake) {}

  /// Any other thread. Returns when the call has been made.
  void run(const std::function<void()>& call) {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return call_ == nullptr; });
    if (!is_served_) return call();
    call_ = &call;
    wake_.signal();
    done_.wait(lock, [&] { return call_ != &call; });
  }

  /// Call it before the serving thread is created.
  void begin() {
    const std::lock_guard lock(mutex_);
    is_served_ = true;
  }
  /// The serving thread calls this when it is awake.
  void serve() {
    const std::lock_guard lock(mutex_);
    take();
  }
  /// The serving thread calls this as its last step.
  void end() {
    const std::lock_guard lock(mutex_);
    take();
    is_served_ = false;
  }

 private:
  void take() {
    if (call_ == nullptr) return;
    (*call_)();
    call_ = nullptr;
    done_.notify_all();
  }

  const WakeEvent& wake_;
  std::mutex mutex_;
  std::condition_variable done_;
  const std::function<void()>* call_ = nullptr;
  bool is_served_ = false;
};

}  // namespace vmigrate::pager
