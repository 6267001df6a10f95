#include "image/fetch.hpp"

#include <mutex>
#include <thread>

#include "image/digests/check.hpp"
#include "image/holder/partial_reader.hpp"
#include "image/holder/supply.hpp"
#include "image/serve/clone_server.hpp"

namespace vmigrate::pager {
namespace {

bool are_of(const ImageDigests& digests, std::span<const TargetRegionConfig> image) {
  if (digests.region_count() != image.size()) return false;
  for (uint32_t i = 0; i < image.size(); ++i) {
    const uint64_t page_bytes = digests.page_bytes(i);
    if (page_bytes != image[i].page_bytes ||
        digests.map(i).page_count() != image[i].length_bytes / image[i].page_bytes) {
      return false;
    }
  }
  return true;
}

class FetchThreads final : public ImageFetch {
 public:
  FetchThreads(std::unique_ptr<ImageCore> core, const FetchOptions& options,
               std::shared_ptr<ImageDigests> digests)
      : core_(std::move(core)),
        digests_(std::move(digests)),
        supply_(*core_, options, digests_.get()),
        multicast_(*core_, supply_.fetch(), digests_.get()),
        server_(*core_, supply_) {}
  ~FetchThreads() override { close(); }

  Status open() { return server_.open(); }

  Status connect(SourceEndpoints endpoints) override {
    const ImageState at = core_->state();
    if (at != ImageState::kIdle && at != ImageState::kCopying) return wrong_state("connect in this state");
    return supply_.fetch().attach(std::move(endpoints));
  }

  Status start() override {
    const std::lock_guard lock(steps_mutex_);
    if (core_->state() != ImageState::kIdle) return wrong_state("start in this state");
    // If every page was here when the session took over, it no longer needs a holder.
    if (supply_.fetch().link_epoch() == 0 && !core_->fill().all_done()) {
      return Error{ErrorCode::kInvalidArgument, 0, "start before connect"};
    }
    core_->begin_copying();
    supply_.fetch().begin();
    if (!core_->advance(ImageState::kIdle, ImageState::kCopying)) return wrong_state("start in this state");
    Status begun = ok();
    server_.commands().run([&] { begun = server_.begin_copying(); });
    if (!begun) {
      core_->fail(begun.error());
      return begun;
    }
    supply_.has_begun_bulk();
    server_.commands().begin();
    const SignalsBlocked blocked;
    bulk_thread_ = std::thread([this] { supply_.run_bulk(); });
    near_thread_ = std::thread([this] { supply_.run_near_bulk(); });
    server_thread_ = std::thread([this] { server_.run(); });
    return ok();
  }

  Status sweep(std::vector<uint32_t> order) override {
    const ImageState at = core_->state();
    if (at == ImageState::kComplete) return ok();
    if (at != ImageState::kCopying) return wrong_state("sweep in this state");
    if (!order.empty()) supply_.fetch().set_order(std::move(order));
    supply_.fetch_all();
    return ok();
  }

  Status add_near(SourceEndpoints endpoints, uint32_t id, uint32_t level) override {
    return supply_.near().add(std::move(endpoints), id, level);
  }
  void remove_near(uint32_t id) override { supply_.near().remove(id); }
  std::vector<NearSnapshot> nears() const override { return supply_.near().snapshot(); }
  std::unique_ptr<RegionReader> reader(uint32_t region_index) override {
    if (region_index >= core_->fill().regions().size()) return nullptr;
    return std::make_unique<PartialReader>(*core_, region_index);
  }
  Status join_multicast(const multicast::Group& group, uint16_t member,
                        std::unique_ptr<multicast::DatagramPort> port) override {
    return multicast_.join(group, member, std::move(port));
  }
  MulticastSnapshot multicast() const override { return multicast_.snapshot(); }

  Status add_clone(const VmMemory& memory) override {
    Status added = ok();
    server_.commands().run([&] { added = server_.add_clone(memory); });
    return added;
  }
  void remove_clone(const VmMemory& memory) override {
    server_.commands().run([&] { server_.remove_clone(memory); });
  }

  Result<std::optional<PageIndex>> check(uint32_t region_index, PageRun run) const override {
    if (!digests_ || region_index >= digests_->region_count())
      return Error{ErrorCode::kInvalidArgument, 0, "check of a region that has no digests"};
    return first_damaged(core_->region(region_index), digests_->map(region_index), run,
                         [this] { return is_closing_.load(std::memory_order_relaxed); });
  }

  void close() override {
    is_closing_.store(true, std::memory_order_relaxed);
    core_->request_stop(ImageCore::Stop::kLetGo);
    supply_.wake_bulk();
    multicast_.close();
    const std::lock_guard lock(steps_mutex_);
    if (bulk_thread_.joinable()) bulk_thread_.join();
    if (near_thread_.joinable()) near_thread_.join();
    if (server_thread_.joinable()) server_thread_.join();
    supply_.let_go();
    core_->finish_close();
  }

  ImageState state() const override {
    const ImageState state = core_->state();
    return state == ImageState::kCopying && supply_.is_lost() ? ImageState::kDisconnected : state;
  }
  std::optional<Error> failure() const override { return core_->failure(); }
  std::vector<uint32_t> touched() const override { return core_->touched().clusters(); }
  void counters(std::span<uint64_t, wire::kImageCounterCount> out) const override;

 private:
  Error wrong_state(const char* what) const {
    if (const auto failure = core_->failure()) return *failure;
    const bool is_closed = core_->must_stop() != ImageCore::Stop::kNone;
    return {is_closed ? ErrorCode::kClosed : ErrorCode::kInvalidArgument, 0, what};
  }

  std::unique_ptr<ImageCore> core_;
  const std::shared_ptr<ImageDigests> digests_;
  std::atomic<bool> is_closing_{false};
  HolderSupply supply_;
  MulticastFeed multicast_;
  CloneServer server_;
  std::mutex steps_mutex_;  // guards start, and the end
  std::thread server_thread_;
  std::thread bulk_thread_;
  std::thread near_thread_;
};

void FetchThreads::counters(std::span<uint64_t, wire::kImageCounterCount> out) const {
  using wire::ImageCounter;
  const auto set = [&](ImageCounter counter, uint64_t value) { out[static_cast<size_t>(counter)] = value; };
  const auto get = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  const FetchCounters& fetched = supply_.counters();
  const uint64_t demand_bytes = get(fetched.demand_bytes), prefetch_bytes = get(fetched.prefetch_bytes);
  const uint64_t near_bytes = get(fetched.near_bytes);
  set(ImageCounter::kPagesTotal, core_->fill().page_count());
  set(ImageCounter::kPagesCopied, core_->fill().pages_present());
  set(ImageCounter::kPagesZero, core_->fill().pages_zero());
  const MulticastSnapshot multicast = multicast_.snapshot();
  set(ImageCounter::kCopiedBytes, demand_bytes + prefetch_bytes + near_bytes + multicast.page_bytes);
  set(ImageCounter::kDemandBytes, demand_bytes);
  set(ImageCounter::kPrefetchBytes, prefetch_bytes);
  set(ImageCounter::kNearBytes, near_bytes);
  set(ImageCounter::kAbsentAnswers, get(fetched.absent_answers));
  set(ImageCounter::kMulticastBytes, multicast.page_bytes);
  set(ImageCounter::kMulticastLostDatagrams, multicast.received.lost_datagrams);
  set(ImageCounter::kOrderedBytes, get(fetched.ordered_bytes));
  set(ImageCounter::kReconnectCount, get(fetched.reconnect_count));
  set(ImageCounter::kRefusedPages, get(fetched.refused_pages) + get(fetched.near_refused_pages));
  set(ImageCounter::kCloneFaultCount, get(core_->clone_fault_count));
  set(ImageCounter::kCloneFaultP99Ns, core_->clone_stats.percentile_ns(990));
  set(ImageCounter::kCopyNs, get(core_->copy_ns));
  set(ImageCounter::kCpuNs, get(core_->serve_cpu_ns) + get(fetched.bulk_cpu_ns) + get(fetched.near_cpu_ns) +
                                multicast.received.cpu_ns);
}

}  // namespace

Result<std::unique_ptr<ImageFetch>> ImageFetch::open(ImageFetchConfig config) {
  auto core = ImageCore::open(config.image, config.resume, std::move(config.on_edge));
  if (!core) return core.error();
  if (config.digests && !are_of(*config.digests, config.image))
    return Error{ErrorCode::kInvalidArgument, 0, "digests of other regions"};
  auto fetch =
      std::make_unique<FetchThreads>(std::move(core).value(), config.options, std::move(config.digests));
  if (auto status = fetch->open(); !status) return status.error();
  return std::unique_ptr<ImageFetch>(std::move(fetch));
}

}  // namespace vmigrate::pager
