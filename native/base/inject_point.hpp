#pragma once

#include <atomic>

#include "wire/wire_generated.hpp"

namespace vmigrate {

/// What a test does at an injection point: park the thread, fail, count. Must be thread-safe. Always nullptr
/// outside tests, which does nothing.
using InjectHook = void (*)(wire::InjectPoint point, uint64_t detail);
inline std::atomic<InjectHook> inject_hook{nullptr};

/// Costs one relaxed load and a predictable branch when no test is listening. The load orders nothing: a hook
/// that reads more than its arguments brings its own lock.
inline void inject_point(wire::InjectPoint point, uint64_t detail = 0) {
  if (InjectHook hook = inject_hook.load(std::memory_order_relaxed)) hook(point, detail);
}

}  // namespace vmigrate
