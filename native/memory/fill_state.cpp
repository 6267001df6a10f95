#include "memory/fill_state.hpp"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "base/check.hpp"
#include "base/page_key.hpp"

namespace vmigrate::pager {
namespace {

constexpr uint64_t kStatBlockBytes = 512;

}  // namespace

Result<std::unique_ptr<FillState>> FillState::open(std::span<const TargetRegionConfig> configs, bool resume,
                                                   std::function<void()> on_done) {
  if (configs.empty() || configs.size() > wire::kPreloadRegionsMax) {
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  }
  std::unique_ptr<FillState> fill(new FillState(std::move(on_done)));
  for (const TargetRegionConfig& config : configs) {
    if (auto status = fill->open_region(config, resume); !status) return status.error();
  }
  fill->pages_done_ = fill->pages_present_ + fill->pages_zero_;
  return fill;
}

Status FillState::open_region(const TargetRegionConfig& config, bool resume) {
  FilledRegion opened;
  auto file =
      memory::Region::open(config.path, config.length_bytes, config.page_bytes, memory::Mode::kReadWrite);
  if (!file) return file.error();
  opened.file = std::move(file).value();
  const uint64_t page_count = opened.file->page_count();
  if (page_count >> kPageKeyPageBits != 0) return Error{ErrorCode::kInvalidArgument, 0, "region length"};
  struct statfs fs {};
  if (::fstatfs(opened.file->fd(), &fs) != 0) return system_error("fstatfs region");
  opened.hugetlbfs = fs.f_type == HUGETLBFS_MAGIC;
  const auto wipe = [&](PageRun run) { return opened.file->punch(run); };
  auto presence = resume
                      ? memory::PresenceMap::reopen(config.presence_path, page_count, config.page_bytes, wipe)
                      : memory::PresenceMap::create(config.presence_path, page_count, config.page_bytes);
  if (!presence) return presence.error();
  opened.presence = std::move(presence).value();
  for (uint64_t page = 0; resume && page < page_count; ++page) {
    const auto state = opened.presence->state(PageIndex{page});
    if (state == wire::PageState::kPresent) ++pages_present_;
    if (state == wire::PageState::kZero) ++pages_zero_;
  }
  page_count_ += page_count;
  regions_.push_back(std::move(opened));
  return ok();
}

void FillState::add_done(uint64_t page_count) {
  // R6 pairs with A6 in all_done: states and bytes of all pages before the last count.
  const uint64_t before = pages_done_.fetch_add(page_count, std::memory_order_acq_rel);
  VMG_CHECK(before + page_count <= page_count_);
  if (before + page_count == page_count_) on_done_();
}

void FillState::add_present(uint64_t page_count) {
  pages_present_.fetch_add(page_count, std::memory_order_relaxed);
  add_done(page_count);
}

void FillState::add_zero(uint64_t page_count) {
  pages_zero_.fetch_add(page_count, std::memory_order_relaxed);
  add_done(page_count);
}

uint64_t FillState::take_back(uint32_t region_index, PageRun run) {
  const auto [present_pages, zero_pages] = regions_[region_index].presence->take_back(run);
  pages_present_.fetch_sub(present_pages, std::memory_order_relaxed);
  pages_zero_.fetch_sub(zero_pages, std::memory_order_relaxed);
  pages_done_.fetch_sub(present_pages + zero_pages, std::memory_order_relaxed);
  return present_pages + zero_pages;
}

bool FillState::all_done() const {
  // A6 pairs with R6 in add_done.
  return pages_done_.load(std::memory_order_acquire) == page_count_;
}

Status FillState::check_files() const {
  for (const FilledRegion& region : regions_) {
    struct stat file {};
    if (::fstat(region.file->fd(), &file) != 0) return system_error("fstat region");
    uint64_t present_pages = 0;
    for (uint64_t page = 0; page < region.page_count(); ++page) {
      present_pages += region.presence->state(PageIndex{page}) == wire::PageState::kPresent ? 1 : 0;
    }
    const uint64_t held_bytes = static_cast<uint64_t>(file.st_blocks) * kStatBlockBytes;
    if (static_cast<uint64_t>(file.st_size) != region.file->length_bytes() ||
        held_bytes < present_pages * region.page_bytes()) {
      return Error{ErrorCode::kRegionChanged, 0, "region file has lost pages"};
    }
  }
  return ok();
}

memory::Clusters clusters_of(const FillState& fill) {
  memory::Clusters clusters;
  for (const FilledRegion& region : fill.regions())
    clusters.add_region(region.file->length_bytes(), region.page_bytes());
  return clusters;
}

}  // namespace vmigrate::pager
