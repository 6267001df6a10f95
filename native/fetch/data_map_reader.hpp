#pragma once

#include <cstdint>

#include "fetch/core.hpp"
#include "fetch/limits.hpp"

namespace vmigrate::pager {

/// Reads the source's data maps over the bulk connection, one region after another, and marks the holes in
/// them kZero. One operation at a time. Bulk thread.
class DataMapReader {
 public:
  explicit DataMapReader(FetchCore& core) : core_(core) {}

  /// Marks the tags of this reader's operations, so that they differ from a FetchTable's.
  static bool owns(uint64_t tag) { return (tag & kTagFlag) != 0; }

  /// True once all holes of the region are marked: its absent pages are data.
  bool known(uint32_t region_index) const { return region_index < region_index_; }
  bool finished() const { return region_index_ == core_.fill().regions().size(); }
  /// Posts the next read if one is due. False: disconnected.
  bool step(Link& link, uint64_t at_ns);
  /// When step must be called next; UINT64_MAX: not before a completion.
  uint64_t due_ns() const { return finished() || in_flight_ ? UINT64_MAX : due_ns_; }
  /// False: disconnected. Any other error fails the session.
  bool complete(const transport::Completion& completion);
  /// Call it when the connection is gone: the outstanding read is posted again on the next connection.
  void rewind();

 private:
  static constexpr uint64_t kTagFlag = uint64_t{1} << 63;
  uint64_t map_bytes() const { return (core_.fill().region(region_index_).page_count() + 7) / 8; }
  bool take_header();
  void take_bits();

  FetchCore& core_;
  uint32_t region_index_ = 0;
  bool header_seen_ =
      false;  // this region's header was read and was ready; its count may have been read before that
  bool in_flight_ = false;
  uint64_t due_ns_ = 0;
  uint64_t generation_ = 0;
  uint64_t at_bytes_ = 0;    // position in the bits
  uint32_t head_bytes_ = 0;  // length of the outstanding read of the header
  uint32_t part_bytes_ = 0;  // length of the outstanding read of the bits
  uint64_t data_pages_expected_ = 0;
  uint64_t data_pages_seen_ = 0;
};

}  // namespace vmigrate::pager
