#include "vm/fit.hpp"

#include <fcntl.h>

#include <algorithm>

namespace vmigrate::pager {
namespace {

Status make_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0) return system_error("fcntl userfaultfd");
  if ((flags & O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    return system_error("fcntl userfaultfd");
  }
  return ok();
}

Status check_range(const MappedRange& range, const VmMemory& memory,
                   std::span<const RegionGeometry> regions) {
  const Error bad{ErrorCode::kInvalidArgument, 0, "mapped range"};
  if (range.region_index >= regions.size()) return bad;
  if (range.descriptor_index >= memory.descriptors.size()) return bad;
  const UffdDescriptor& descriptor = memory.descriptors[range.descriptor_index];
  if (descriptor.kind != wire::PreloadDescriptor::kSync || !descriptor.fd.valid()) return bad;
  const auto [length_bytes, page_bytes] = regions[range.region_index];
  if (range.length_bytes == 0 || range.length_bytes % page_bytes != 0 ||
      range.region_offset_bytes % page_bytes != 0 ||
      raw(range.base) % std::min<uint64_t>(page_bytes, wire::kPageBytesMin) != 0) {
    return bad;
  }
  if (range.region_offset_bytes > length_bytes ||
      range.length_bytes > length_bytes - range.region_offset_bytes ||
      raw(range.base) > UINT64_MAX - range.length_bytes) {
    return bad;
  }
  return ok();
}

bool covers(const VmMemory& memory, uint32_t region_index, uint64_t length_bytes) {
  std::vector<MappedRange> ranges;
  for (const MappedRange& range : memory.ranges) {
    if (range.region_index == region_index) ranges.push_back(range);
  }
  std::sort(ranges.begin(), ranges.end(), [](const MappedRange& a, const MappedRange& b) {
    return a.region_offset_bytes < b.region_offset_bytes;
  });
  uint64_t covered_bytes = 0;
  for (const MappedRange& range : ranges) {
    if (range.region_offset_bytes > covered_bytes) break;
    covered_bytes = std::max(covered_bytes, range.region_offset_bytes + range.length_bytes);
  }
  return covered_bytes == length_bytes;
}

}  // namespace

std::vector<RegionGeometry> geometry_of(const FillState& fill) {
  std::vector<RegionGeometry> geometry;
  for (const FilledRegion& region : fill.regions()) {
    geometry.push_back({region.file->length_bytes(), region.page_bytes()});
  }
  return geometry;
}

Status check_vm_fits(const VmMemory& memory, std::span<const RegionGeometry> regions) {
  for (const MappedRange& range : memory.ranges) {
    if (auto status = check_range(range, memory, regions); !status) return status;
    if (auto status = make_nonblocking(memory.descriptors[range.descriptor_index].fd.get()); !status) {
      return status;
    }
  }
  for (uint32_t i = 0; i < regions.size(); ++i) {
    if (!covers(memory, i, regions[i].length_bytes)) {
      return Error{ErrorCode::kInvalidArgument, 0, "the VM does not map every byte of a region"};
    }
  }
  return ok();
}

const MappedRange* find_range(const VmMemory& memory, uint32_t descriptor_index, HostAddr address) {
  for (const MappedRange& range : memory.ranges) {
    if (range.descriptor_index == descriptor_index && raw(address) >= raw(range.base) &&
        raw(address) - raw(range.base) < range.length_bytes) {
      return &range;
    }
  }
  return nullptr;
}

PageKey key_in(const MappedRange& range, HostAddr address, uint64_t page_bytes) {
  const uint64_t offset_bytes = range.region_offset_bytes + (raw(address) - raw(range.base));
  return page_key(range.region_index, PageIndex{offset_bytes / page_bytes});
}

}  // namespace vmigrate::pager
