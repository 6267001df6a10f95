#pragma once

#include <mutex>

#include "image/parent/copier.hpp"
#include "image/parent/guard.hpp"
#include "source/region_reader.hpp"

namespace vmigrate::pager {

/// One region of an image that is being captured, as other hosts read it: a page that is not in the image yet
/// is copied first, as for a clone of this host. Before seal every call fails.
class ImageReader final : public RegionReader {
 public:
  /// The capture whose parts these are must outlive the reader.
  ImageReader(ParentMemory& memory, ParentGuard& guard, uint32_t region_index);

  Status read(uint64_t offset_bytes, std::span<std::byte> out) const override;
  Status each_data_run(const std::function<void(PageRun)>& visit) const override;

 private:
  Status check_sealed() const;
  Status bring(PageIndex page) const;
  Status read_present(uint64_t offset_bytes, std::span<std::byte> out) const;

  ParentMemory& memory_;
  ImageCore& core_;
  const uint32_t region_index_;
  mutable std::mutex copier_mutex_;  // not taken for pages that are in the image
  mutable ImageCopier copier_;
};

}  // namespace vmigrate::pager
