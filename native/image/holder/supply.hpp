#pragma once

#include <optional>

#include "fetch/bulk.hpp"
#include "fetch/demand_lane.hpp"
#include "image/holder/page_gate.hpp"
#include "image/serve/core.hpp"
#include "image/serve/supply.hpp"

namespace vmigrate::pager {

/// Supplies an image with the pages of another holder of it, on another host: a page that a clone waits for
/// is read at once, and the bulk thread reads which pages are holes, and the other pages.
class HolderSupply final : public Supply, private FetchOwner, private PageSink {
 public:
  /// `digests` may be nullptr, and must outlive it.
  HolderSupply(ImageCore& core, const FetchOptions& options, const ImageDigests* digests);

  FetchCore& fetch() { return fetch_; }
  /// Body of the bulk thread. Call has_begun_bulk before the thread exists.
  void run_bulk() { bulk_.run(); }
  void has_begun_bulk() { is_bulk_begun_ = true; }
  bool is_lost() const { return fetch_.is_lost(); }
  const FetchCounters& counters() const { return fetch_.counters; }
  /// Any thread: lets the bulk thread look whether it must end.
  void wake_bulk() const { fetch_.bulk_wake.signal(); }

  Status open(Watcher& watcher) override;
  void begin() override {}
  Status begin_copying() override { return ok(); }
  void on_fault(PageKey key, uint64_t read_ns) override;
  Answer want(uint32_t region_index, PageIndex page) override;
  void on_ready(uint32_t /*tag*/) override {}  // the next step looks at the connection
  void step() override;
  int timeout_ms() const override;
  int completion_fd() const override { return lane_ ? lane_->event_fd() : -1; }
  bool has_ended() const override;
  void let_go() override;

 private:
  /// Of pages that the thread which serves the clones has fetched: it looks at all waits after each step.
  class DemandSink final : public PageSink {
   public:
    explicit DemandSink(PageGate& gate) : gate_(gate) {}
    void publish(uint32_t region_index, PageRun run) override { gate_.publish(region_index, run); }
    bool is_awaited(uint32_t, PageRun) const override { return true; }
    bool has_room(size_t) const override { return true; }
    bool has_deferred() const override { return false; }
    bool retry() override { return false; }

   private:
    PageGate& gate_;
  };

  // FetchOwner
  void fail(const Error& error) override;
  bool must_end() const override;
  void on_connection() override { core_.notify(); }
  bool may_be_zero(uint32_t region_index, PageIndex page) const override {
    return bulk_gate_.may_be_zero(region_index, page);
  }
  bool zeros_are_right(uint32_t region_index, PageRun run) override {
    return bulk_gate_.zeros_are_right(region_index, run);
  }
  // PageSink of the bulk thread
  void publish(uint32_t region_index, PageRun run) override { bulk_gate_.publish(region_index, run); }
  /// Publishing is a store for each page here, so the order of two runs makes no difference.
  bool is_awaited(uint32_t, PageRun) const override { return false; }
  bool has_room(size_t) const override { return true; }
  bool has_deferred() const override { return false; }
  bool retry() override { return false; }

  ImageCore& core_;
  FetchCore fetch_;
  PageGate demand_gate_, bulk_gate_;
  DemandSink demand_sink_;
  std::optional<DemandLane> lane_;
  BulkThread bulk_;
  bool is_bulk_begun_ = false;
};

}  // namespace vmigrate::pager
