#pragma once

#include <atomic>
#include <initializer_list>
#include <mutex>
#include <optional>

#include "base/result.hpp"

namespace vmigrate {

/// The state of a session, as its threads and its owner see it, and the first error that failed it. Changes
/// are rare and take a mutex. Thread-safe.
template <typename State>
class SessionState {
 public:
  explicit SessionState(State initial) : state_(initial) {}

  State get() const {
    // A4 pairs with R4 in every change: what led to the state is visible to a thread that sees the state.
    return state_.load(std::memory_order_acquire);
  }
  /// Changes the state if it is one of `from`, and returns whether it was. `before` runs first if it was, and
  /// nobody sees the new state before it has returned; it must not block.
  template <typename Before>
  bool advance(std::initializer_list<State> from, State to, Before before) {
    const std::lock_guard lock(mutex_);
    if (!is_one_of(from)) return false;
    before();
    state_.store(to, std::memory_order_release);  // R4
    return true;
  }
  bool advance(std::initializer_list<State> from, State to) {
    return advance(from, to, [] {});
  }
  /// The same, and keeps the error.
  bool fail(std::initializer_list<State> from, State failed, const Error& error) {
    return advance(from, failed, [&] { failure_ = error; });
  }
  std::optional<Error> failure() const {
    const std::lock_guard lock(mutex_);
    return failure_;
  }

 private:
  bool is_one_of(std::initializer_list<State> states) const {
    for (const State state : states) {
      if (state_.load(std::memory_order_relaxed) == state) return true;
    }
    return false;
  }

  mutable std::mutex mutex_;
  std::atomic<State> state_;
  std::optional<Error> failure_;
};

}  // namespace vmigrate
