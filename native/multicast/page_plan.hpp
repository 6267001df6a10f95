#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "memory/region.hpp"
#include "memory/touch_order.hpp"
#include "multicast/datagram/limits.hpp"

namespace vmigrate::multicast {

/// Which pages of an image are still to be sent, and in which order: each page with data once, the wanted
/// ones first, then those of an order, the others upwards. One thread.
class PagePlan {
 public:
  struct Piece {
    uint32_t region_index;
    PageRun run;
  };

  /// Looks for the holes of the files, which are never sent. Takes some milliseconds for each GiB. `order`:
  /// clusters (memory/touch_order.hpp) that go before the others.
  static Result<PagePlan> of(std::span<const std::unique_ptr<memory::Region>> regions,
                             std::vector<uint32_t> order = {});

  uint64_t page_count() const { return page_count_; }
  bool is_done() const { return left_count_ == 0; }
  /// The pages around this one go first, those of them that are left. Ignores a page that does not exist.
  void want(uint32_t region_index, PageIndex page);
  /// Takes the next run, of at most so many pages; nullopt: all pages have been taken.
  std::optional<Piece> next(uint64_t count_max);

 private:
  struct Pages {
    std::vector<uint64_t> left;  ///< a bit for each page
    uint64_t page_count = 0;
    bool has(uint64_t page) const { return (left[page / 64] >> (page % 64) & 1) != 0; }
    /// The first page that is left in [from, end); `end` if there is none.
    uint64_t first_left(uint64_t from, uint64_t end) const;
  };
  std::optional<Piece> take_ordered(uint64_t count_max);
  Piece take(uint32_t region_index, uint64_t first, uint64_t end);

  std::vector<Pages> regions_;
  uint64_t page_count_ = 0, left_count_ = 0;
  memory::OrderedPages order_;
  std::optional<memory::Clusters::Place> ordered_;  ///< what is left of the last clusters of the order
  uint32_t sweep_region_ = 0;
  uint64_t sweep_page_ = 0;
  std::array<Piece, kWantedClustersMax> wanted_{};
  size_t wanted_head_ = 0, wanted_count_ = 0;
};

}  // namespace vmigrate::multicast
