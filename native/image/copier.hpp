#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "image/core.hpp"

namespace vmigrate::pager {

class ParentGuard;

/// Brings pages from the parent's files into the image. Each thread has one of its own; a page is copied by
/// whoever claims it.
class ImageCopier {
 public:
  /// `claimed`: where tests may park this thread.
  ImageCopier(ImageCore& core, ParentGuard& guard, wire::InjectPoint claimed);

  /// Every page of the run that nobody has is brought here: holes become zero, the rest is claimed, copied
  /// and published. Then the parent may write to all pages of the run that are here, and is woken for them.
  /// Pages that the other thread has claimed are left to it. The run is no longer than kImageChunkBytes, or
  /// one page. False: the capture has failed.
  bool fill(uint32_t region_index, PageRun run);

 private:
  /// Pages with data, [first, end), after nothing but holes.
  struct Data {
    uint64_t first;
    uint64_t end;
  };
  std::optional<Data> find_data(uint32_t region_index, uint64_t page, uint64_t end);
  std::optional<uint64_t> find_own(uint32_t region_index, uint64_t page, uint64_t end);
  ssize_t move_bytes(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes);
  bool copy(uint32_t region_index, PageRun run);
  bool is_here(const ImageRegion& region, uint64_t page) const;

  ImageCore& core_;
  ParentGuard& guard_;
  const wire::InjectPoint claimed_point_;
  std::vector<std::byte> process_bytes_;  ///< of one that is read, on the way to the image
};

}  // namespace vmigrate::pager
