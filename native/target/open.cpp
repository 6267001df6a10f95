// Opens a target session: opens files and presence maps, and checks that the VM's mappings cover them.

#include <linux/magic.h>
#include <sys/vfs.h>

#include "target/core.hpp"
#include "vm/fit.hpp"

namespace vmigrate::pager {
Result<std::unique_ptr<TargetCore>> TargetCore::open(const VmMemory& memory,
                                                     std::span<const TargetRegionConfig> configs,
                                                     const TargetOptions& options, bool resume,
                                                     std::function<void()> on_edge) {
  if (configs.empty() || configs.size() > wire::kPreloadRegionsMax) {
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  }
  if (options.prefetch_bytes_max < wire::kPageBytesMin ||
      options.prefetch_bytes_max > wire::kTransferBytesMax) {
    return Error{ErrorCode::kInvalidArgument, 0, "prefetch_bytes_max"};
  }
  std::unique_ptr<TargetCore> core(new TargetCore());
  core->vm_ = &memory;
  core->options_ = options;
  core->resume_ = resume;
  core->on_edge_ = on_edge ? std::move(on_edge) : [] {};
  core->map_buffer.resize(kMapPartBytes);
  if (!core->demand_wake.valid() || !core->bulk_wake.valid()) return system_error("eventfd");
  if (auto status = core->open_regions(configs); !status) return status.error();
  std::vector<RegionGeometry> geometry;
  for (const TargetRegion& region : core->regions_) {
    geometry.push_back({region.region->length_bytes(), region.region->page_bytes()});
  }
  if (auto status = check_vm_fits(memory, geometry); !status) return status.error();
  for (const MappedRange& range : memory.ranges) {
    core->regions_[range.region_index].ranges.push_back(range);
  }
  return core;
}

Status TargetCore::open_regions(std::span<const TargetRegionConfig> configs) {
  for (const TargetRegionConfig& config : configs) {
    TargetRegion opened;
    auto region =
        memory::Region::open(config.path, config.length_bytes, config.page_bytes, memory::Mode::kReadWrite);
    if (!region) return region.error();
    opened.region = std::move(region).value();
    const uint64_t page_count = opened.region->page_count();
    if (page_count >> kPageKeyPageBits != 0) return Error{ErrorCode::kInvalidArgument, 0, "region length"};
    struct statfs fs {};
    if (::fstatfs(opened.region->fd(), &fs) != 0) return system_error("fstatfs region");
    opened.hugetlbfs = fs.f_type == HUGETLBFS_MAGIC;
    auto presence = resume_
                        ? memory::PresenceMap::reopen(config.presence_path, page_count, config.page_bytes)
                        : memory::PresenceMap::create(config.presence_path, page_count, config.page_bytes);
    if (!presence) return presence.error();
    opened.presence = std::move(presence).value();
    page_count_ += page_count;
    if (resume_) {
      for (uint64_t page = 0; page < page_count; ++page) {
        const auto state = opened.presence->state(PageIndex{page});
        if (state == wire::PageState::kPresent) ++pages_present_;
        if (state == wire::PageState::kZero) ++pages_zero_;
      }
    }
    regions_.push_back(std::move(opened));
  }
  pages_done_ = pages_present_ + pages_zero_;
  return ok();
}

}  // namespace vmigrate::pager
