#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "fetch/fetch_table.hpp"
#include "fetch/near/holders.hpp"

namespace vmigrate::pager {

/// The pages that clones wait for and that one near holder has been asked for. If a thread serves the READs,
/// it looks itself whether the page is there. A device cannot, so the page's state is read first, and then,
/// when that READ has completed, the page. Thread that serves the clones.
class NearDemandLane {
 public:
  /// `number` names the lane in its owner's epoll.
  NearDemandLane(FetchCore& core, NearLink near, uint64_t number);

  NearHolder& holder() { return *near_.holder; }
  const NearHolder& holder() const { return *near_.holder; }
  uint64_t number() const { return number_; }
  int event_fd() const { return near_.link.endpoint->event_fd(); }
  size_t used_count() const { return fetches_.used_count() + look_count_; }
  bool has_unposted() const { return fetches_.has_unposted() || unposted_look_count_ != 0; }
  /// When the holder counts as silent; UINT64_MAX: nothing is asked of it.
  uint64_t silent_ns() const { return used_count() == 0 ? UINT64_MAX : heard_ns_ + kNearerSilentNs; }
  /// Why it cannot be used any more.
  const std::optional<Error>& failure() const { return failure_; }

  /// Takes over the claim of a page. Call post next.
  void start(uint32_t region_index, PageIndex page, uint64_t at_ns);
  /// Posts what has been started, as far as the transport accepts it.
  void post();

  struct Claim {
    uint32_t region_index;
    PageIndex page;
  };
  /// What has been decided about some claims, which the caller takes over.
  struct Polled {
    std::array<Claim, kCompletionBatchMax> here, absent;
    size_t here_count = 0, absent_count = 0;
    bool is_any = false;
  };
  /// Looks at some completions.
  Polled poll(uint64_t at_ns);
  /// Ends the connection, and visits each claim, which the caller takes over.
  template <typename Visit>
  void give_up(Visit visit) {
    near_.link.endpoint.reset();  // first: it must not write into pages that are fetched elsewhere
    fetches_.drain([&](uint32_t region_index, PageRun run) { visit(region_index, run.first); });
    for (Look& look : looks_)
      if (std::exchange(look.in_use, false)) visit(look.claim.region_index, look.claim.page);
    look_count_ = unposted_look_count_ = 0;
  }

 private:
  /// The state of a page is being read.
  struct Look {
    Claim claim{};
    uint32_t generation = 0;
    bool in_use = false;
    bool is_posted = false;
  };
  static constexpr uint64_t kLookFlag = uint64_t{1} << 63;
  static constexpr unsigned kLookSlotBits = 16;
  static uint64_t tag_of(size_t slot, uint32_t generation) {
    return kLookFlag | uint64_t{generation} << kLookSlotBits | slot;
  }

  void fail(ErrorCode code, const char* what) { failure_ = Error{code, 0, what}; }
  void post_looks();
  void take_look(const transport::Completion& completion, Polled& polled);

  FetchCore& core_;
  NearLink near_;
  const uint64_t number_;
  FetchTable fetches_;
  std::array<Look, kDemandFetchesMax> looks_{};
  size_t look_count_ = 0;
  size_t unposted_look_count_ = 0;
  uint64_t heard_ns_ = 0;  ///< the last completion, or when the first of what is outstanding was asked
  std::optional<Error> failure_;
};

}  // namespace vmigrate::pager
