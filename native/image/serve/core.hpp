#pragma once

// State that the threads of one image share while it fills. The thread that serves the clones
// (clone_server.hpp) and the threads of the supply (supply.hpp) meet only here; docs/PAGE_STATES.md,
// "Images", describes the protocol between them.

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/fault_stats.hpp"
#include "base/session_state.hpp"
#include "base/thread_util.hpp"
#include "image/serve/state.hpp"
#include "memory/fill_state.hpp"
#include "memory/touch_order.hpp"
#include "vm/fit.hpp"

namespace vmigrate::pager {

class ImageCore {
 public:
  /// `on_edge` may be empty; it is called by any thread when state() has changed, and must not block or call
  /// back.
  static Result<std::unique_ptr<ImageCore>> open(std::span<const TargetRegionConfig> image, bool resume,
                                                 std::function<void()> on_edge);

  // --- immutable after open
  FillState& fill() { return *fill_; }
  FilledRegion& region(uint32_t index) { return fill_->region(index); }
  const std::vector<RegionGeometry>& geometry() const { return geometry_; }
  bool resume() const { return resume_; }
  /// Which clusters the clones touch first.
  memory::TouchOrder& touched() { return *touched_; }
  /// The pages around `page` that are copied, or mapped, together with it.
  PageRun cluster(uint32_t region_index, PageIndex page) const;

  // --- state. Never kDisconnected here: only a supply knows its connection.
  ImageState state() const { return state_.get(); }
  /// Returns false and changes nothing if the state is not `from`.
  bool advance(ImageState from, ImageState to) { return state_.advance({from}, to); }
  /// kArming, kArmed or kCopying -> kFailed. The first error is kept.
  void fail(const Error& error);
  std::optional<Error> failure() const { return state_.failure(); }
  void complete();
  /// How the threads must end if they are stopped early: kLeave keeps the parent registered, kLetGo releases
  /// it.
  enum class Stop : uint8_t { kNone = 0, kLeave, kLetGo };
  void request_stop(Stop stop);
  /// kFailed counts as kLetGo.
  Stop must_stop() const;
  /// Call it after the threads have ended.
  void finish_close();
  /// Call it before any thread copies: times are measured from here.
  void begin_copying();
  void notify() { on_edge_(); }

  // --- between the threads
  FaultStats clone_stats;
  std::atomic<uint64_t> clone_fault_count{0};
  std::atomic<uint64_t> copy_ns{0};  ///< duration of the copying; 0 until it has ended
  std::atomic<uint64_t> serve_cpu_ns{0};
  WakeEvent serve_wake;
  /// Number of faults that wait for a page which another thread has claimed (F11, F12).
  std::atomic<size_t> wait_count{0};
  /// Pages were published by another thread than the one that serves the clones: wakes it if any fault waits.
  void wake_waits();

 private:
  ImageCore(bool resume, std::function<void()> on_edge) : resume_(resume), on_edge_(std::move(on_edge)) {}

  const bool resume_;
  const std::function<void()> on_edge_;
  std::unique_ptr<FillState> fill_;
  std::vector<RegionGeometry> geometry_;
  std::optional<memory::TouchOrder> touched_;  ///< set by open
  uint64_t copying_since_ns_ = 0;              ///< written before any thread copies
  SessionState<ImageState> state_{ImageState::kIdle};
  std::atomic<Stop> stop_{Stop::kNone};
};

}  // namespace vmigrate::pager
