#include "vm/mapping.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "vm/process_file_error.hpp"

namespace vmigrate::pager {

namespace {

/// Neither we nor QEMU have a user address above this (five-level page tables included).
constexpr uint64_t kUserAddressMax = uint64_t{1} << 56;
constexpr uint64_t kPageBytesMax = uint64_t{1} << 30;

bool overlap(uint64_t a, uint64_t a_length, uint64_t b, uint64_t b_length) {
  return a < b + b_length && b < a + a_length;
}

Result<std::string> read_maps(pid_t pid) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/%d/maps", static_cast<int>(pid));
  UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return process_file_error("open /proc/PID/maps");
  std::string text;
  char chunk[16384];
  for (;;) {
    const ssize_t count = ::read(fd.get(), chunk, sizeof chunk);
    if (count == 0) return text;
    if (count > 0)
      text.append(chunk, static_cast<size_t>(count));
    else if (errno != EINTR)
      return process_file_error("read /proc/PID/maps");
  }
}

}  // namespace

Result<FileIdentity> identify(const RegionFileConfig& region) {
  struct stat file {};
  if (::lstat(region.path.c_str(), &file) != 0) return system_error("lstat region file");
  if (!S_ISREG(file.st_mode) || file.st_uid != ::geteuid())
    return Error{ErrorCode::kRegionChanged, 0, "region is not a regular file of this user"};
  if (static_cast<uint64_t>(file.st_size) != region.length_bytes)
    return Error{ErrorCode::kRegionChanged, 0, "region file has another length"};
  return FileIdentity{file.st_dev, file.st_ino};
}

Status check_regions(std::span<const RegionFileConfig> regions) {
  if (regions.empty() || regions.size() > wire::kPreloadRegionsMax)
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  for (const RegionFileConfig& region : regions) {
    if (region.path.empty() || region.path[0] != '/' || region.path.find('\n') != std::string::npos)
      return Error{ErrorCode::kInvalidArgument, 0, "region path must be absolute, without newlines"};
    if (region.page_bytes < wire::kPageBytesMin || region.page_bytes > kPageBytesMax ||
        !std::has_single_bit(region.page_bytes))
      return Error{ErrorCode::kInvalidArgument, 0, "region page size"};
    if (region.length_bytes == 0 || region.length_bytes % region.page_bytes != 0 ||
        region.length_bytes > kUserAddressMax)
      return Error{ErrorCode::kInvalidArgument, 0, "region length"};
  }
  return ok();
}

Status check_range(const MappedRange& range, std::span<const RegionFileConfig> regions,
                   std::span<const MappedRange> taken) {
  if (range.region_index >= regions.size())
    return Error{ErrorCode::kProtocol, 0, "range of an unknown region"};
  const RegionFileConfig& region = regions[range.region_index];
  const uint64_t offset = range.region_offset_bytes, length = range.length_bytes, base = raw(range.base);
  if (length == 0 || length > region.length_bytes || offset > region.length_bytes - length)
    return Error{ErrorCode::kProtocol, 0, "range outside its region"};
  if ((offset | length | base) % region.page_bytes != 0)
    return Error{ErrorCode::kProtocol, 0, "range not on whole pages"};
  if (base == 0 || base > kUserAddressMax - length) return Error{ErrorCode::kProtocol, 0, "range address"};
  for (const MappedRange& other : taken) {
    if (overlap(base, length, raw(other.base), other.length_bytes) ||
        (other.region_index == range.region_index &&
         overlap(offset, length, other.region_offset_bytes, other.length_bytes)))
      return Error{ErrorCode::kAlreadyExists, 0, "region mapped twice"};
  }
  return ok();
}

Status check_mapped(pid_t pid, const MappedRange& range, const FileIdentity& file, bool is_private) {
  Result<std::string> maps = read_maps(pid);
  if (!maps) return maps.error();
  uint64_t next = raw(range.base);
  const uint64_t end = next + range.length_bytes;
  // Lines are ordered by address. An madvise of a part splits one mapping into several lines.
  for (const char* line = maps.value().c_str(); *line != '\0' && next < end;) {
    uint64_t first = 0, last = 0, offset = 0, inode = 0;
    unsigned device_major = 0, device_minor = 0;
    char sharing = 0;
    const int fields = std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %*3s%c %" SCNx64 " %x:%x %" SCNu64, &first,
                                   &last, &sharing, &offset, &device_major, &device_minor, &inode);
    if (fields == 7 && first <= next && next < last) {
      const bool is_same_file = inode == file.inode && makedev(device_major, device_minor) == file.device;
      const uint64_t expected = range.region_offset_bytes + (next - raw(range.base));
      if (!is_same_file || offset + (next - first) != expected || (sharing == 'p') != is_private) break;
      next = last;
    }
    const char* newline = std::strchr(line, '\n');
    if (newline == nullptr) break;
    line = newline + 1;
  }
  if (next < end) return Error{ErrorCode::kRegionChanged, 0, "range is not a mapping of its region"};
  return ok();
}

bool covers_all(std::span<const MappedRange> ranges, std::span<const RegionFileConfig> regions) {
  // No byte is in two ranges, so comparing the sums is enough.
  uint64_t mapped = 0, wanted = 0;
  for (const MappedRange& range : ranges) mapped += range.length_bytes;
  for (const RegionFileConfig& region : regions) wanted += region.length_bytes;
  return mapped == wanted;
}

std::vector<MappedRange> stripe(const MappedRange& mapping, uint64_t page_bytes,
                                std::span<const uint32_t> descriptor_indices) {
  const uint64_t most = std::max<uint64_t>(1, mapping.length_bytes / std::max(kStripeBytesMin, page_bytes));
  const uint64_t count = std::min<uint64_t>(descriptor_indices.size(), most);
  const uint64_t page_count = mapping.length_bytes / page_bytes;
  std::vector<MappedRange> stripes;
  for (uint64_t i = 0; i < count; i++) {
    const uint64_t first = page_count * i / count * page_bytes,
                   end = page_count * (i + 1) / count * page_bytes;
    stripes.push_back({mapping.region_index, mapping.region_offset_bytes + first, end - first,
                       mapping.base + first, descriptor_indices[i]});
  }
  return stripes;
}

bool is_userfaultfd(int fd) {
  char path[32], target[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  const ssize_t length = ::readlink(path, target, sizeof target);
  return length > 0 && std::string_view(target, static_cast<size_t>(length)) == "anon_inode:[userfaultfd]";
}

}  // namespace vmigrate::pager
