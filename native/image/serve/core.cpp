#include "image/core.hpp"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>

#include "base/check.hpp"
#include "base/page_key.hpp"
#include "image/limits.hpp"
#include "vm/mapping.hpp"

namespace vmigrate::pager {

namespace {

constexpr uint64_t kStatBlockBytes = 512;

}  // namespace

PageRun ImageRegion::cluster(PageIndex page) const {
  const uint64_t pages = pages_in(kImageClusterBytes);
  const uint64_t first = raw(page) / pages * pages;
  return {PageIndex{first}, std::min(pages, presence->page_count() - first)};
}

Result<std::unique_ptr<ImageCore>> ImageCore::open(ImageConfig config) {
  if (config.source.size() != config.image.size()) {
    return Error{ErrorCode::kInvalidArgument, 0, "regions of image and source"};
  }
  if (Status good = check_regions(config.source); !good) return good.error();
  std::unique_ptr<ImageCore> core(new ImageCore());
  core->config_ = std::move(config);
  if (!core->config_.on_edge) core->config_.on_edge = [] {};
  if (!core->fault_wake.valid()) return system_error("eventfd");
  for (size_t i = 0; i < core->config_.source.size(); ++i) {
    if (auto status = core->open_region(core->config_.source[i], core->config_.image[i]); !status) {
      return status.error();
    }
  }
  core->pages_done_ = core->pages_present_ + core->pages_zero_;
  if (core->parent() != nullptr) {
    if (auto status = check_vm_fits(*core->parent(), core->geometry_); !status) return status.error();
  }
  if (std::any_of(core->regions_.begin(), core->regions_.end(),
                  [](const ImageRegion& region) { return region.is_in_process; })) {
    auto process = ProcessMemory::open(*core->parent());
    if (!process) return process.error();
    core->process_ = std::move(process).value();
  }
  return core;
}

Status ImageCore::open_region(const RegionFileConfig& source, const TargetRegionConfig& image) {
  if (image.length_bytes != source.length_bytes || image.page_bytes != source.page_bytes) {
    return Error{ErrorCode::kInvalidArgument, 0, "image region has another length or page size"};
  }
  ImageRegion opened;
  auto from =
      memory::Region::open(source.path, source.length_bytes, source.page_bytes, memory::Mode::kReadOnly);
  if (!from) return from.error();
  auto to = memory::Region::open(image.path, image.length_bytes, image.page_bytes, memory::Mode::kReadWrite);
  if (!to) return to.error();
  opened.source = std::move(from).value();
  opened.image = std::move(to).value();
  const uint64_t page_count = opened.image->page_count();
  if (page_count >> kPageKeyPageBits != 0) return Error{ErrorCode::kInvalidArgument, 0, "region length"};
  struct statfs fs {};
  if (::fstatfs(opened.image->fd(), &fs) != 0) return system_error("fstatfs region");
  opened.hugetlbfs = fs.f_type == HUGETLBFS_MAGIC;
  opened.is_in_process = source.is_private;
  if (opened.is_in_process && (parent() == nullptr || opened.hugetlbfs)) {
    return Error{ErrorCode::kUnsupported, 0, "image of copy-on-write memory: no process, or on hugetlbfs"};
  }
  auto presence = config_.resume
                      ? memory::PresenceMap::reopen(image.presence_path, page_count, image.page_bytes)
                      : memory::PresenceMap::create(image.presence_path, page_count, image.page_bytes);
  if (!presence) return presence.error();
  opened.presence = std::move(presence).value();
  for (uint64_t page = 0; config_.resume && page < page_count; ++page) {
    const auto state = opened.presence->state(PageIndex{page});
    if (state == wire::PageState::kPresent) ++pages_present_;
    if (state == wire::PageState::kZero) ++pages_zero_;
  }
  page_count_ += page_count;
  geometry_.push_back({image.length_bytes, image.page_bytes});
  regions_.push_back(std::move(opened));
  return ok();
}

Status ImageCore::look_for_data() {
  for (uint32_t i = 0; i < regions_.size(); ++i) {
    ImageRegion& region = regions_[i];
    region.data.assign((region.presence->page_count() + 63) / 64, 0);
    const auto note = [&](uint64_t first, uint64_t end) {
      for (uint64_t page = first; page < end; ++page) region.data[page / 64] |= uint64_t{1} << page % 64;
    };
    auto status =
        region.source->each_data_run([&](PageRun run) { note(raw(run.first), raw(run.first) + run.count); });
    if (!status) return status;
    if (!region.is_in_process) continue;
    const uint64_t kernel_pages = region.page_bytes() / wire::kPageBytesMin;
    status = process_->each_own_run(i, 0, region.source->length_bytes(), [&](PageRun run) {
      note(raw(run.first) / kernel_pages, (raw(run.first) + run.count + kernel_pages - 1) / kernel_pages);
    });
    if (!status) return status;
  }
  return ok();
}

Status ImageCore::check_image_files() const {
  for (const ImageRegion& region : regions_) {
    struct stat file {};
    if (::fstat(region.image->fd(), &file) != 0) return system_error("fstat image");
    uint64_t present_pages = 0;
    for (uint64_t page = 0; page < region.presence->page_count(); ++page) {
      present_pages += region.presence->state(PageIndex{page}) == wire::PageState::kPresent ? 1 : 0;
    }
    const uint64_t held_bytes = static_cast<uint64_t>(file.st_blocks) * kStatBlockBytes;
    if (static_cast<uint64_t>(file.st_size) != region.image->length_bytes() ||
        held_bytes < present_pages * region.page_bytes()) {
      return Error{ErrorCode::kRegionChanged, 0, "image file has lost pages"};
    }
  }
  return ok();
}

void ImageCore::add_done(uint64_t page_count) {
  // R12 pairs with A12 in all_done: states and bytes of all pages before the last count.
  const uint64_t before = pages_done_.fetch_add(page_count, std::memory_order_acq_rel);
  VMG_CHECK(before + page_count <= page_count_);
  if (before + page_count == page_count_) fault_wake.signal();
}

void ImageCore::add_present(uint64_t page_count) {
  pages_present_.fetch_add(page_count, std::memory_order_relaxed);
  add_done(page_count);
}

void ImageCore::add_zero(uint64_t page_count) {
  pages_zero_.fetch_add(page_count, std::memory_order_relaxed);
  add_done(page_count);
}

bool ImageCore::all_done() const {
  // A12 pairs with R12 in add_done.
  return pages_done_.load(std::memory_order_acquire) == page_count_;
}

bool ImageCore::advance(ImageState from, ImageState to) {
  const std::lock_guard lock(mutex_);
  if (state() != from) return false;
  // R11 pairs with A11 in state.
  state_.store(to, std::memory_order_release);
  return true;
}

void ImageCore::begin_copying() {
  copying_since_ns_ = now_ns();
  parent_stats.start(copying_since_ns_);
  clone_stats.start(copying_since_ns_);
}

void ImageCore::fail(const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    if (state() != ImageState::kArming && state() != ImageState::kArmed && state() != ImageState::kCopying) {
      return;
    }
    failure_ = error;
    state_.store(ImageState::kFailed, std::memory_order_release);  // R11
  }
  fault_wake.signal();
  config_.on_edge();
}

std::optional<Error> ImageCore::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void ImageCore::complete() {
  counters.copy_ns.store(std::max<uint64_t>(1, now_ns() - copying_since_ns_), std::memory_order_relaxed);
  if (advance(ImageState::kCopying, ImageState::kComplete)) config_.on_edge();
}

void ImageCore::request_stop(Stop stop) {
  Stop none = Stop::kNone;
  // R14 pairs with A14 in must_stop; nothing but the value itself is handed over. The first one counts.
  stop_.compare_exchange_strong(none, stop, std::memory_order_acq_rel);
  fault_wake.signal();
}

ImageCore::Stop ImageCore::must_stop() const {
  if (state() == ImageState::kFailed) return Stop::kLetGo;
  // A14 pairs with R14 in request_stop.
  return stop_.load(std::memory_order_acquire);
}

void ImageCore::finish_close() {
  const std::lock_guard lock(mutex_);
  if (state() != ImageState::kComplete && state() != ImageState::kFailed) {
    state_.store(ImageState::kClosed, std::memory_order_release);  // R11
  }
}

}  // namespace vmigrate::pager
