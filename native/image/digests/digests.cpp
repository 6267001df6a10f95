#include "image/digests/digests.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "memory/page_hasher.hpp"

namespace vmigrate::pager {
namespace {

/// Digests that make() adds at once.
constexpr uint64_t kAppendCount = 1024;

Result<UniqueFd> open_image(const DigestRegionConfig& config) {
  if (!memory::digest_of_zeros(config.page_bytes) || config.length_bytes == 0 ||
      config.length_bytes % config.page_bytes != 0) {
    return Error{ErrorCode::kInvalidArgument, 0, "region length or page size"};
  }
  UniqueFd fd(::open(config.path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd.valid()) return system_error("open region file");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat region");
  if (!S_ISREG(file.st_mode) || file.st_uid != ::geteuid())
    return Error{ErrorCode::kInvalidArgument, 0, "region is not a regular file of this user"};
  if (static_cast<uint64_t>(file.st_size) != config.length_bytes)
    return Error{ErrorCode::kRegionChanged, 0, "region file has another length"};
  return fd;
}

}  // namespace

Result<std::shared_ptr<ImageDigests>> ImageDigests::open(std::span<const DigestRegionConfig> configs) {
  if (configs.empty() || configs.size() > wire::kPreloadRegionsMax)
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  std::shared_ptr<ImageDigests> opened(new ImageDigests());
  for (const DigestRegionConfig& config : configs) {
    auto region = std::make_unique<Region>();
    auto file = open_image(config);
    if (!file) return file.error();
    region->file = std::move(file).value();
    region->page_bytes = config.page_bytes;
    auto map = memory::DigestMap::open_or_create(config.digest_path, config.length_bytes / config.page_bytes,
                                                 config.page_bytes);
    if (!map) return map.error();
    region->map = std::move(map).value();
    opened->regions_.push_back(std::move(region));
  }
  return opened;
}

Result<ImageDigests::Region*> ImageDigests::region(uint32_t region_index) const {
  if (region_index >= regions_.size()) return Error{ErrorCode::kInvalidArgument, 0, "no such region"};
  return regions_[region_index].get();
}

Result<uint64_t> ImageDigests::known(uint32_t region_index) const {
  const auto found = region(region_index);
  if (!found) return found.error();
  return found.value()->map->known();
}

Result<std::vector<std::byte>> ImageDigests::read(uint32_t region_index, PageIndex first,
                                                  uint64_t count) const {
  const auto found = region(region_index);
  if (!found) return found.error();
  const memory::DigestMap& map = *found.value()->map;
  const uint64_t known = map.known();
  if (raw(first) > known || count > known - raw(first))
    return Error{ErrorCode::kInvalidArgument, 0, "digests that are not known"};
  const auto digests = map.digests({first, count});
  return std::vector<std::byte>(digests.begin(), digests.end());
}

Status ImageDigests::append(Region& region, uint64_t first, std::span<const std::byte> digests) {
  const std::lock_guard lock(region.append_mutex);
  if (region.map->known() != first)
    return Error{ErrorCode::kInvalidArgument, 0, "digests do not begin where the known ones end"};
  if (digests.size() % wire::kDigestBytes != 0 ||
      digests.size() / wire::kDigestBytes > region.map->page_count() - first) {
    return Error{ErrorCode::kProtocol, 0, "length of digests"};
  }
  region.map->append(digests);
  return ok();
}

Status ImageDigests::accept(uint32_t region_index, PageIndex first, std::span<const std::byte> digests) {
  const auto found = region(region_index);
  if (!found) return found.error();
  return append(*found.value(), raw(first), digests);
}

Status ImageDigests::make(uint32_t region_index, uint64_t count) {
  const auto found = region(region_index);
  if (!found) return found.error();
  Region& region = *found.value();
  const std::lock_guard lock(region.make_mutex);
  uint64_t page = region.map->known();
  if (count > region.map->page_count() - page)
    return Error{ErrorCode::kInvalidArgument, 0, "digests of more pages than there are"};
  auto hasher = memory::PageHasher::create();
  if (!hasher) return hasher.error();
  hasher.value()->begin(region.file.get(), region.page_bytes, {PageIndex{page}, count});
  std::vector<std::byte> digests(std::min(count, kAppendCount) * wire::kDigestBytes);
  for (uint64_t left = count; left != 0;) {
    const uint64_t part = std::min(left, kAppendCount);
    for (uint64_t i = 0; i < part; ++i) {
      if (is_stopped_.load(std::memory_order_relaxed)) return Error{ErrorCode::kClosed, 0, "make digests"};
      const auto digest = hasher.value()->next();
      if (!digest) return digest.error();
      std::memcpy(&digests[i * wire::kDigestBytes], digest.value().data(), wire::kDigestBytes);
    }
    const auto added = append(region, page, std::span(digests).first(part * wire::kDigestBytes));
    if (!added) return added;
    page += part;
    left -= part;
  }
  return ok();
}

}  // namespace vmigrate::pager
