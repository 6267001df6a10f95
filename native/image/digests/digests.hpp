#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "memory/digest_map.hpp"

namespace vmigrate::pager {

/// A region of an image: its file, and the file of its pages' digests.
struct DigestRegionConfig {
  std::string path;
  std::string digest_path;
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
};

/// The digests of the pages of an image. The host that has the whole image makes them; a host that reads the
/// image from another accepts them from the host that took it. Thread-safe.
class ImageDigests {
 public:
  /// The files of the image must exist. Digests of an earlier process are taken over.
  static Result<std::shared_ptr<ImageDigests>> open(std::span<const DigestRegionConfig> configs);

  size_t region_count() const { return regions_.size(); }
  uint64_t page_bytes(uint32_t region_index) const { return regions_[region_index]->page_bytes; }
  const memory::DigestMap& map(uint32_t region_index) const { return *regions_[region_index]->map; }

  // The calls below give kInvalidArgument for a region that does not exist.

  /// The digests of so many pages are known, from the first page on.
  Result<uint64_t> known(uint32_t region_index) const;
  /// kInvalidArgument if not all of them are known.
  Result<std::vector<std::byte>> read(uint32_t region_index, PageIndex first, uint64_t count) const;
  /// Reads the next `count` pages of the image's file, all of which must be there, and adds their digests.
  /// kRegionChanged if the file has become shorter, kClosed after stop(). What was added before stays.
  Status make(uint32_t region_index, uint64_t count);
  /// Adds digests that another host has made. `first` must be known(); kProtocol if they are not the whole
  /// digests of pages of the region.
  Status accept(uint32_t region_index, PageIndex first, std::span<const std::byte> digests);
  /// Ends a make() that is running, soon, and refuses another.
  void stop() { is_stopped_.store(true, std::memory_order_relaxed); }

 private:
  struct Region {
    UniqueFd file;
    uint64_t page_bytes = 0;
    std::unique_ptr<memory::DigestMap> map;
    std::mutex make_mutex;    ///< one make() at a time
    std::mutex append_mutex;  ///< guards appends to `map`
  };
  ImageDigests() = default;
  Result<Region*> region(uint32_t region_index) const;
  static Status append(Region& region, uint64_t first, std::span<const std::byte> digests);

  std::vector<std::unique_ptr<Region>> regions_;
  std::atomic<bool> is_stopped_{false};
};

}  // namespace vmigrate::pager
