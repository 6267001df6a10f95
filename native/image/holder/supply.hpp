#pragma once

#include <optional>

#include "fetch/bulk.hpp"
#include "fetch/demand_lane.hpp"
#include "fetch/near/bulk.hpp"
#include "fetch/near/demand.hpp"
#include "image/holder/page_gate.hpp"
#include "image/serve/core.hpp"
#include "image/serve/supply.hpp"

namespace vmigrate::pager {

/// Supplies an image with the pages of another holder of it, on another host, the root: a page that a clone
/// waits for is read at once, and the bulk thread reads which pages are holes, and the other pages. Hosts
/// that hold a part of the image may be nearer, and are asked before.
class HolderSupply final : public Supply, private FetchOwner, private PageSink {
 public:
  /// `digests` may be nullptr, and must outlive it.
  HolderSupply(ImageCore& core, const FetchOptions& options, const ImageDigests* digests);

  FetchCore& fetch() { return fetch_; }
  /// Body of the bulk thread. Call has_begun_bulk before the thread exists.
  void run_bulk() { bulk_.run(); }
  void has_begun_bulk() { is_bulk_begun_ = true; }
  /// Body of the thread that reads from near holders, which begins with the bulk thread.
  void run_near_bulk() { near_bulk_.run(); }
  NearHolders& near() { return near_holders_; }
  const NearHolders& near() const { return near_holders_; }
  /// Any thread: the pages that nobody waits for are fetched as well.
  void fetch_all();
  bool is_lost() const { return fetch_.is_lost(); }
  const FetchCounters& counters() const { return fetch_.counters; }
  /// Any thread: lets the bulk threads look whether they must end.
  void wake_bulk() const { fetch_.wake_bulk(); }

  Status open(Watcher& watcher) override;
  void begin() override {}
  Status begin_copying() override { return ok(); }
  void on_fault(PageKey key, uint64_t read_ns) override;
  Answer want(uint32_t region_index, PageIndex page) override;
  void on_ready(uint32_t /*tag*/) override {}  // the next step looks at the connection
  void step() override;
  int timeout_ms() const override;
  std::array<int, 2> completion_fds() const override;
  bool has_ended() const override;
  void let_go() override;

 private:
  /// Of pages that the thread which serves the clones has fetched: it looks at all waits after each step.
  class DemandSink final : public PageSink {
   public:
    explicit DemandSink(PageGate& gate) : gate_(gate) {}
    void publish(uint32_t region_index, PageRun run) override { (void)gate_.publish(region_index, run); }
    bool is_awaited(uint32_t, PageRun) const override { return true; }
    bool has_room(size_t) const override { return true; }
    bool has_deferred() const override { return false; }
    bool retry() override { return false; }

   private:
    PageGate& gate_;
  };
  /// Of pages that near holders have brought.
  class NearGate final : public NearSink {
   public:
    explicit NearGate(PageGate& gate) : gate_(gate) {}
    uint64_t publish(uint32_t region_index, PageRun run) override {
      return gate_.publish(region_index, run, PageGate::Origin::kNear);
    }
    void give_back(uint32_t region_index, PageRun run) override { gate_.give_back(region_index, run); }

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
  void publish(uint32_t region_index, PageRun run) override { (void)bulk_gate_.publish(region_index, run); }
  /// Publishing is a store for each page here, so the order of two runs makes no difference.
  bool is_awaited(uint32_t, PageRun) const override { return false; }
  bool has_room(size_t) const override { return true; }
  bool has_deferred() const override { return false; }
  bool retry() override { return false; }

  ImageCore& core_;
  FetchCore fetch_;
  PageGate demand_gate_, bulk_gate_, near_gate_;
  DemandSink demand_sink_;
  std::optional<DemandLane> lane_;
  BulkThread bulk_;
  NearHolders near_holders_;
  NearGate near_demand_sink_, near_bulk_sink_;
  std::optional<NearDemand> near_demand_;
  NearBulkThread near_bulk_;
  bool is_bulk_begun_ = false;
};

}  // namespace vmigrate::pager
