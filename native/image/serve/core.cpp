#include "image/serve/core.hpp"

#include <algorithm>

#include "image/serve/limits.hpp"

namespace vmigrate::pager {

Result<std::unique_ptr<ImageCore>> ImageCore::open(std::span<const TargetRegionConfig> image, bool resume,
                                                   std::function<void()> on_edge) {
  std::unique_ptr<ImageCore> core(new ImageCore(
      resume, on_edge ? std::move(on_edge) : [] {}));
  if (!core->serve_wake.valid()) return system_error("eventfd");
  auto fill = FillState::open(image, resume, [core = core.get()] { core->serve_wake.signal(); });
  if (!fill) return fill.error();
  core->fill_ = std::move(fill).value();
  core->geometry_ = geometry_of(*core->fill_);
  core->touched_.emplace(clusters_of(*core->fill_));
  return core;
}

PageRun ImageCore::cluster(uint32_t region_index, PageIndex page) const {
  const FilledRegion& region = fill_->regions()[region_index];
  const uint64_t pages = region.pages_in(kImageClusterBytes);
  const uint64_t first = raw(page) / pages * pages;
  return {PageIndex{first}, std::min(pages, region.page_count() - first)};
}

void ImageCore::begin_copying() {
  copying_since_ns_ = now_ns();
  clone_stats.start(copying_since_ns_);
}

void ImageCore::fail(const Error& error) {
  if (!state_.fail({ImageState::kArming, ImageState::kArmed, ImageState::kCopying}, ImageState::kFailed,
                   error))
    return;
  serve_wake.signal();
  on_edge_();
}

void ImageCore::complete() {
  copy_ns.store(std::max<uint64_t>(1, now_ns() - copying_since_ns_), std::memory_order_relaxed);
  if (advance(ImageState::kCopying, ImageState::kComplete)) on_edge_();
}

void ImageCore::request_stop(Stop stop) {
  Stop none = Stop::kNone;
  // R14 pairs with A14 in must_stop; nothing but the value itself is handed over. The first one counts.
  stop_.compare_exchange_strong(none, stop, std::memory_order_acq_rel);
  serve_wake.signal();
}

ImageCore::Stop ImageCore::must_stop() const {
  if (state() == ImageState::kFailed) return Stop::kLetGo;
  // A14 pairs with R14 in request_stop.
  return stop_.load(std::memory_order_acquire);
}

void ImageCore::finish_close() {
  static_cast<void>(
      state_.advance({ImageState::kIdle, ImageState::kArming, ImageState::kArmed, ImageState::kCopying},
                     ImageState::kClosed));
}

void ImageCore::wake_waits() {
  // F11 pairs with F12 in WaitList::add: the states stored before, the count looked at after.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (wait_count.load(std::memory_order_relaxed) != 0) serve_wake.signal();
}

}  // namespace vmigrate::pager
