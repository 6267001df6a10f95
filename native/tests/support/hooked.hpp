#pragma once

#include <mutex>
#include <shared_mutex>

#include "base/inject_point.hpp"

namespace vmigrate::test {

/// Makes one object the process's injection hook. Threads of hosts that the test keeps may run before the
/// object is made and after it is gone, so a thread inside meet() holds the object alive: remove() waits for
/// it.
template <typename Owner>
class Hooked {
 public:
  static void install(Owner& owner) {
    const std::unique_lock lock(mutex_);
    owner_ = &owner;
    inject_hook.store(&hook);
  }
  /// The caller has released all threads that it parked, and parks no more.
  static void remove() {
    const std::unique_lock lock(mutex_);
    inject_hook.store(nullptr);
    owner_ = nullptr;
  }

 private:
  static void hook(wire::InjectPoint point, uint64_t detail) {
    const std::shared_lock lock(mutex_);
    if (owner_ != nullptr) owner_->meet(point, detail);
  }
  inline static std::shared_mutex mutex_;
  inline static Owner* owner_ = nullptr;
};

}  // namespace vmigrate::test
