// Opening a target session: files, presence maps, and whether the VM's mappings cover them.

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>

#include <algorithm>

#include "pager/target_core.hpp"

namespace vmigrate::pager {
namespace {

/// A blocking userfaultfd would stop the demand thread in a read, and poll on it reports an error.
Status make_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0) return system_error("fcntl userfaultfd");
  if ((flags & O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return system_error("fcntl userfaultfd");
  }
  return ok();
}

Status check_range(const MappedRange& range, const VmMemory& memory,
                   const std::vector<TargetRegion>& regions) {
  const Error bad{ErrorCode::kInvalidArgument, 0, "mapped range"};
  if (range.region_index >= regions.size()) return bad;
  if (range.descriptor_index >= memory.descriptors.size()) return bad;
  const UffdDescriptor& descriptor = memory.descriptors[range.descriptor_index];
  if (descriptor.kind != wire::PreloadDescriptor::kSync || !descriptor.fd.valid()) return bad;
  const memory::Region& region = *regions[range.region_index].region;
  const uint64_t page_bytes = region.page_bytes();
  if (range.length_bytes == 0 || range.length_bytes % page_bytes != 0 ||
      range.region_offset_bytes % page_bytes != 0 ||
      raw(range.base) % std::min<uint64_t>(page_bytes, wire::kPageBytesMin) != 0) {
    return bad;
  }
  if (range.region_offset_bytes > region.length_bytes() ||
      range.length_bytes > region.length_bytes() - range.region_offset_bytes ||
      raw(range.base) > UINT64_MAX - range.length_bytes) {
    return bad;
  }
  return ok();
}

}  // namespace

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
  for (const MappedRange& range : memory.ranges) {
    if (auto status = check_range(range, memory, core->regions_); !status) return status.error();
    core->regions_[range.region_index].ranges.push_back(range);
    if (auto status = make_nonblocking(memory.descriptors[range.descriptor_index].fd.get()); !status) {
      return status.error();
    }
  }
  if (auto status = core->check_coverage(); !status) return status.error();
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

Status TargetCore::check_coverage() const {
  for (const TargetRegion& region : regions_) {
    std::vector<MappedRange> ranges = region.ranges;
    std::sort(ranges.begin(), ranges.end(), [](const MappedRange& a, const MappedRange& b) {
      return a.region_offset_bytes < b.region_offset_bytes;
    });
    uint64_t covered_bytes = 0;
    for (const MappedRange& range : ranges) {
      if (range.region_offset_bytes > covered_bytes) break;
      covered_bytes = std::max(covered_bytes, range.region_offset_bytes + range.length_bytes);
    }
    if (covered_bytes != region.region->length_bytes()) {
      return Error{ErrorCode::kInvalidArgument, 0, "the VM does not map every byte of a region"};
    }
  }
  return ok();
}

}  // namespace vmigrate::pager
