#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "image/parent/memory.hpp"

namespace vmigrate::pager {

class ParentGuard;

/// Copies pages from the parent's files into the image. Each thread has its own ImageCopier; the thread that
/// claims a page copies it.
class ImageCopier {
 public:
  /// `claimed`: the injection point at which tests may park this thread.
  ImageCopier(ParentMemory& memory, ParentGuard& guard, wire::InjectPoint claimed);

  /// Brings every unclaimed page of the run into the image: holes become zero; the other pages are claimed,
  /// copied and published. Then allows the parent to write to all pages of the run that are here, and wakes
  /// it for them. Pages that the other thread has claimed are left to that thread. The run is no longer than
  /// kImageChunkBytes, or one page. False: the capture has failed.
  bool fill(uint32_t region_index, PageRun run);

 private:
  /// A range of pages with data, [first, end), that follows nothing but holes.
  struct Data {
    uint64_t first;
    uint64_t end;
  };
  std::optional<Data> find_data(uint32_t region_index, uint64_t page, uint64_t end);
  std::optional<uint64_t> find_own(uint32_t region_index, uint64_t page, uint64_t end);
  ssize_t move_bytes(uint32_t region_index, uint64_t offset_bytes, uint64_t length_bytes);
  bool copy(uint32_t region_index, PageRun run);
  bool is_here(const FilledRegion& region, uint64_t page) const;

  ParentMemory& memory_;
  ImageCore& core_;
  ParentGuard& guard_;
  const wire::InjectPoint claimed_point_;
  std::vector<std::byte>
      process_bytes_;  ///< bytes of a page that is read from the process, on the way to the image
};

}  // namespace vmigrate::pager
