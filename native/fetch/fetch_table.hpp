#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/types.hpp"
#include "fetch/core.hpp"
#include "fetch/limits.hpp"

namespace vmigrate::pager {

/// A claimed run that is being fetched from the source. Pages larger than one transfer need several
/// operations.
struct Fetch {
  uint32_t region_index = 0;
  PageRun run;
  uint64_t length_bytes = 0;
  uint64_t posted_bytes = 0;
  uint32_t operations_in_flight = 0;
  uint32_t generation = 0;  ///< of the slot; a completion must carry the same number
  bool is_absent = false;   ///< the holder has said so of a part
  bool in_use = false;
};

/// The fetches of one lane, from claim to publish. Slots are fixed and posted in the order in which they were
/// started. The lane's thread owns the table. A claimed page is always in exactly one slot of one lane, or
/// was claimed by a process that is dead.
class FetchTable {
 public:
  FetchTable(const FillState& fill, std::atomic<uint64_t>& bytes_counter, size_t capacity)
      : fill_(fill), bytes_counter_(bytes_counter), capacity_(capacity) {}

  size_t free_count() const { return capacity_ - used_count_; }
  size_t used_count() const { return used_count_; }
  /// Number of bytes of all fetches in the table.
  uint64_t bytes() const { return bytes_; }
  /// The caller has claimed the run. There must be a free slot.
  void start(uint32_t region_index, PageRun run);
  /// Posts as many operations as the endpoint accepts. False: disconnected.
  bool post(Link& link);
  bool has_unposted() const { return queue_count_ != 0; }

  /// kAbsent: the holder has not got all of it, and no operation of the fetch is outstanding any more. For a
  /// lane whose holder has everything that is an error.
  enum class Progress { kMore, kFinished, kAbsent, kDisconnected, kFailed };
  struct Completed {
    Progress progress;
    size_t slot =
        0;  ///< kFinished: every byte is here; call get, publish, then release it. kAbsent: release it
    Error error{};  ///< set for kFailed and kAbsent
  };
  Completed complete(const transport::Completion& completion);
  const Fetch& get(size_t slot) const { return slots_[slot]; }
  void release(size_t slot);
  /// Call it when the connection is gone and its endpoint is destroyed, so that nothing writes into the runs
  /// any more. All operations are posted again on the next connection.
  void rewind();
  /// The same condition. Visits and releases each fetch: the caller takes the claims over.
  template <typename Visit>
  void drain(Visit visit) {
    rewind();
    queue_count_ = 0;
    for (size_t slot = 0; slot < kSlotsMax; ++slot) {
      if (!slots_[slot].in_use) continue;
      const Fetch fetch = slots_[slot];
      release(slot);
      visit(fetch.region_index, fetch.run);
    }
  }

 private:
  static constexpr size_t kSlotsMax = kDemandFetchesMax;
  static_assert(kBulkFetchesMax <= kSlotsMax);

  void enqueue(size_t slot);
  void dequeue(size_t slot);

  const FillState& fill_;
  std::atomic<uint64_t>& bytes_counter_;
  const size_t capacity_;
  std::array<Fetch, kSlotsMax> slots_;
  size_t used_count_ = 0;
  uint64_t bytes_ = 0;
  // Ring of the slots that have bytes not yet posted.
  std::array<uint16_t, kSlotsMax> queue_{};
  size_t queue_head_ = 0;
  size_t queue_count_ = 0;
};

}  // namespace vmigrate::pager
