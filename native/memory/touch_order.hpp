#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/types.hpp"
#include "wire/wire_generated.hpp"

namespace vmigrate::memory {

/// The clusters of an image: pieces of wire::kTouchClusterBytes, numbered from 0 through all of its regions.
/// A page that is larger than a cluster is named by the first of its clusters.
class Clusters {
 public:
  struct Place {
    uint32_t region_index;
    PageRun pages;
  };

  void add_region(uint64_t length_bytes, uint64_t page_bytes);
  uint64_t count() const { return count_; }
  uint64_t number(uint32_t region_index, PageIndex page) const;
  /// The pages that a cluster is a part of, or that are parts of it; nullopt: there is no such cluster.
  std::optional<Place> place(uint64_t number) const;
  uint64_t page_bytes(uint32_t region_index) const { return regions_[region_index].page_bytes; }

 private:
  struct Region {
    uint64_t first = 0;  ///< number of its first cluster
    uint64_t length_bytes = 0;
    uint64_t page_bytes = 0;
  };
  std::vector<Region> regions_;
  uint64_t count_ = 0;
};

/// Records the order in which the clusters of an image are touched for the first time, each once, up to
/// wire::kTouchClustersMax of them. Recording neither allocates nor locks. Thread-safe.
class TouchOrder {
 public:
  explicit TouchOrder(Clusters clusters);
  void touch(uint32_t region_index, PageIndex page);
  /// What has been recorded so far. A later call returns the same and what came after it.
  std::vector<uint32_t> clusters() const;

 private:
  const Clusters clusters_;
  const uint64_t capacity_;
  std::unique_ptr<std::atomic<uint64_t>[]> seen_;     ///< a bit for each cluster
  std::unique_ptr<std::atomic<uint32_t>[]> entries_;  ///< the number of a cluster, and one; 0: not yet
  std::atomic<uint64_t> taken_{0};  ///< entries that somebody has taken; may exceed capacity_
};

/// Walks through an order that was recorded once. The order may come from a peer or a file: clusters that do
/// not exist are passed over. One thread.
class OrderedPages {
 public:
  OrderedPages() = default;
  OrderedPages(Clusters clusters, std::vector<uint32_t> order)
      : clusters_(std::move(clusters)), order_(std::move(order)) {}
  /// The pages of the next clusters: of as many as follow one another in the region and in the order, and are
  /// not longer than that together. nullopt: that was all.
  std::optional<Clusters::Place> next(uint64_t length_bytes_max);

 private:
  Clusters clusters_;
  std::vector<uint32_t> order_;
  size_t at_ = 0;
};

}  // namespace vmigrate::memory
