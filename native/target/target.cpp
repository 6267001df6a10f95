#include "target/target.hpp"

#include <algorithm>
#include <mutex>
#include <thread>

#include "fetch/bulk.hpp"
#include "target/ahead_sink.hpp"
#include "target/core.hpp"
#include "target/demand.hpp"
#include "target/publish.hpp"

namespace vmigrate::pager {
namespace {

class TargetThreads final : public TargetSession {
 public:
  explicit TargetThreads(std::unique_ptr<TargetCore> core)
      : core_(std::move(core)),
        demand_(*core_),
        ahead_sink_(*core_),
        bulk_sink_(*core_),
        bulk_(core_->fetch(), bulk_sink_) {}
  ~TargetThreads() override { close(); }

  Status open() {
    if (auto status = bulk_sink_.open(); !status) return status;
    if (auto status = ahead_sink_.open(); !status) return status;
    return demand_.open();
  }

  Status connect(SourceEndpoints endpoints) override { return core_->attach(std::move(endpoints)); }

  Status fetch_ahead() override {
    const std::lock_guard lock(threads_mutex_);
    const TargetState state = core_->state();
    bulk_.hold(false);
    if (ahead_thread_.joinable() && (state == TargetState::kAhead || state == TargetState::kDisconnected))
      return ok();
    if (auto status = core_->begin_ahead(); !status) return status;
    join_ahead();
    const SignalsBlocked blocked;
    ahead_thread_ = std::thread([this] {
      bulk_.run_ahead(ahead_sink_);
      core_->end_ahead(bulk_.is_quiet());
    });
    return ok();
  }

  Status hold_ahead() override {
    const std::lock_guard lock(threads_mutex_);
    if (ahead_thread_.joinable()) bulk_.hold(true);
    return ok();
  }

  Result<uint64_t> take_back(uint32_t round) override {
    const std::lock_guard lock(threads_mutex_);
    if (core_->state() != TargetState::kIdle)
      return Error{ErrorCode::kInvalidArgument, 0, "take back in this state"};
    join_ahead();
    return bulk_.take_back(round);
  }

  Status start() override {
    const std::lock_guard lock(threads_mutex_);
    if (core_->state() == TargetState::kIdle) join_ahead();
    const bool serving = demand_thread_.joinable() && !bulk_thread_.joinable();
    if (!serving) {
      if (auto status = core_->begin(); !status) return status;
    }
    const SignalsBlocked blocked;
    bulk_thread_ = std::thread([this] { bulk_.run(); });
    if (!serving) demand_thread_ = std::thread([this] { demand_.run(); });
    return ok();
  }

  /// The demand thread alone never ends the session: it waits for bulk_ended.
  Status serve_demand() override {
    const std::lock_guard lock(threads_mutex_);
    if (core_->state() == TargetState::kIdle) join_ahead();
    if (auto status = core_->begin(); !status) return status;
    const SignalsBlocked blocked;
    demand_thread_ = std::thread([this] { demand_.run(); });
    return ok();
  }

  void close() override {
    const std::lock_guard lock(threads_mutex_);
    core_->request_stop();
    join_ahead();
    if (demand_thread_.joinable()) demand_thread_.join();
    if (bulk_thread_.joinable()) bulk_thread_.join();
    core_->finish_close();
  }

  TargetState state() const override { return core_->state(); }
  std::optional<Error> failure() const override { return core_->failure(); }

  void counters(std::span<uint64_t, wire::kTargetCounterCount> out) const override {
    using wire::TargetCounter;
    const auto set = [&](TargetCounter counter, uint64_t value) {
      out[static_cast<size_t>(counter)] = value;
    };
    const auto get = [](const std::atomic<uint64_t>& counter) {
      return counter.load(std::memory_order_relaxed);
    };
    const TargetCounters& counted = core_->counters;
    const FetchCounters& fetched = core_->fetch().counters;
    set(TargetCounter::kPageCount, core_->fill().page_count());
    set(TargetCounter::kPagesPresent, core_->fill().pages_present());
    set(TargetCounter::kPagesZero, core_->fill().pages_zero());
    set(TargetCounter::kDemandBytes, get(fetched.demand_bytes));
    const uint64_t bulk_bytes = get(fetched.prefetch_bytes);
    const uint64_t ahead_bytes = std::min(bulk_bytes, get(counted.ahead_bytes));
    set(TargetCounter::kPrefetchBytes, bulk_bytes - ahead_bytes);
    set(TargetCounter::kPushBytes, ahead_bytes);
    set(TargetCounter::kFaultCount, get(counted.fault_count));
    set(TargetCounter::kFaultOnClaimedCount, get(counted.fault_on_claimed_count));
    set(TargetCounter::kFaultP50Ns, core_->stats.percentile_ns(500));
    set(TargetCounter::kFaultP99Ns, core_->stats.percentile_ns(990));
    set(TargetCounter::kFaultMaxNs, core_->stats.max_ns());
    set(TargetCounter::kFaultWaitNs, core_->stats.wait_ns());
    set(TargetCounter::kDegradedNs, core_->stats.degraded_ns());
    set(TargetCounter::kReconnectCount, get(fetched.reconnect_count));
    set(TargetCounter::kCompletedNs, get(counted.completed_ns));
    set(TargetCounter::kCpuNs, get(counted.demand_cpu_ns) + get(fetched.bulk_cpu_ns));
  }

 private:
  /// It ends soon: it has changed the state, or must end.
  void join_ahead() {
    if (ahead_thread_.joinable()) ahead_thread_.join();
  }

  std::unique_ptr<TargetCore> core_;
  DemandThread demand_;
  AheadSink ahead_sink_;
  Publisher bulk_sink_;
  BulkThread bulk_;
  std::mutex threads_mutex_;  // guards the threads, from their start to their end
  std::thread ahead_thread_;
  std::thread demand_thread_;
  std::thread bulk_thread_;
};

}  // namespace

Result<std::unique_ptr<TargetSession>> TargetSession::open(const VmMemory& memory,
                                                           std::span<const TargetRegionConfig> regions,
                                                           const TargetOptions& options, bool resume,
                                                           std::function<void()> on_edge) {
  auto core = TargetCore::open(memory, regions, options, resume, std::move(on_edge));
  if (!core) return core.error();
  auto session = std::make_unique<TargetThreads>(std::move(core).value());
  if (auto status = session->open(); !status) return status.error();
  return std::unique_ptr<TargetSession>(std::move(session));
}

}  // namespace vmigrate::pager
