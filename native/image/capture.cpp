#include "image/capture.hpp"

#include <mutex>
#include <thread>

#include "base/inject_point.hpp"
#include "image/parent/reader.hpp"
#include "image/parent/supply.hpp"
#include "image/parent/sweep.hpp"
#include "image/serve/clone_server.hpp"
#include "image/serve/limits.hpp"

namespace vmigrate::pager {
namespace {

const Error kWrongState{ErrorCode::kInvalidArgument, 0,
                        "this call is not allowed in this state of the capture"};

class CaptureThreads final : public ImageCapture {
 public:
  CaptureThreads(std::unique_ptr<ImageCore> core, std::unique_ptr<ParentMemory> parent)
      : core_(std::move(core)),
        parent_(std::move(parent)),
        guard_(*parent_),
        supply_(*parent_, guard_),
        server_(*core_, supply_),
        sweep_(*parent_, guard_) {}
  ~CaptureThreads() override { leave(); }

  Status open() { return server_.open(); }

  Status arm() override {
    const std::lock_guard lock(steps_mutex_);
    const uint64_t begin_ns = now_ns(), begin_cpu_ns = thread_cpu_ns();
    if (core_->resume() || !core_->advance(ImageState::kIdle, ImageState::kArming)) return closed_or_wrong();
    if (auto status = arm_all(); !status) {
      // The capture was closed meanwhile, and that caused any error here.
      if (core_->must_stop() != ImageCore::Stop::kNone) return closed_or_wrong();
      core_->fail(status.error());
      if (!server_thread_.joinable()) guard_.let_go();
      return status;
    }
    if (!core_->advance(ImageState::kArming, ImageState::kArmed)) return closed_or_wrong();
    parent_->counters.arm_ns.store(now_ns() - begin_ns, std::memory_order_relaxed);
    parent_->counters.arm_cpu_ns.store(thread_cpu_ns() - begin_cpu_ns, std::memory_order_relaxed);
    return ok();
  }

  Status protect() override {
    const std::lock_guard lock(steps_mutex_);
    return in_pause(parent_->counters.protect_ns, [this] { return guard_.protect_noted(); });
  }

  Status seal(Sweep when) override {
    const std::lock_guard lock(steps_mutex_);
    const Status sealed = in_pause(parent_->counters.seal_ns, [this]() -> Status {
      if (auto status = guard_.protect_noted(); !status) return status;
      begin_copying();
      if (!core_->advance(ImageState::kArmed, ImageState::kCopying)) return closed_or_wrong();
      return server_.begin_copying();
    });
    if (sealed && when == Sweep::kAtOnce) start_sweep();
    return sealed;
  }

  Status sweep() override {
    const std::lock_guard lock(steps_mutex_);
    const ImageState state = core_->state();
    // The parent and the clones may have asked for every page already.
    if (state == ImageState::kComplete || sweep_thread_.joinable()) return ok();
    if (state != ImageState::kCopying || core_->must_stop() != ImageCore::Stop::kNone)
      return closed_or_wrong();
    start_sweep();
    return ok();
  }

  Status resume() override {
    const std::lock_guard lock(steps_mutex_);
    if (!core_->resume() || core_->state() != ImageState::kIdle) return closed_or_wrong();
    if (auto status = parent_->look_for_data(); !status) return status;
    begin_copying();
    if (!core_->advance(ImageState::kIdle, ImageState::kCopying)) return closed_or_wrong();
    if (auto status = server_.begin_copying(); !status) {
      core_->fail(status.error());
      supply_.let_go();
      return status;
    }
    start_server();
    start_sweep();
    return ok();
  }

  std::unique_ptr<RegionReader> reader(uint32_t region_index) override {
    if (region_index >= core_->fill().regions().size()) return nullptr;
    return std::make_unique<ImageReader>(*parent_, guard_, region_index);
  }

  Status add_clone(const VmMemory& memory) override {
    Status added = ok();
    server_.commands().run([&] { added = server_.add_clone(memory); });
    return added;
  }
  void remove_clone(const VmMemory& memory) override {
    server_.commands().run([&] { server_.remove_clone(memory); });
  }

  void close() override { end(ImageCore::Stop::kLetGo); }
  void leave() override { end(ImageCore::Stop::kLeave); }

  ImageState state() const override { return core_->state(); }
  std::optional<Error> failure() const override { return core_->failure(); }
  std::vector<uint32_t> touched() const override { return core_->touched().clusters(); }
  void counters(std::span<uint64_t, wire::kImageCounterCount> out) const override;

 private:
  Error closed_or_wrong() const {
    if (const auto failure = core_->failure()) return *failure;
    if (core_->must_stop() == ImageCore::Stop::kNone) return kWrongState;
    return Error{ErrorCode::kClosed, 0, "the capture was closed"};
  }

  Status arm_all() {
    if (auto status = parent_->look_for_data(); !status) return status;
    if (auto status = guard_.register_ranges(); !status) return status;
    // The server runs before anything is protected, so that a write to a protected page is answered.
    start_server();
    if (auto status = guard_.protect_all(); !status) return status;
    // The first round protects what was written while everything was being protected, which is much. Each
    // next round protects what was written during the round before, which is less. The rest is left to the
    // pause.
    for (int round = 0; round < kImageArmRoundsMax; ++round) {
      const uint64_t before = parent_->counters.rearmed_pages.load(std::memory_order_relaxed);
      if (auto status = guard_.protect_noted(); !status) return status;
      const uint64_t pages = parent_->counters.rearmed_pages.load(std::memory_order_relaxed) - before;
      if (pages * parent_->page_bytes(0) <= kImageArmedBytes) break;
    }
    return ok();
  }

  /// Runs on the thread that serves the clones and reads the faults, so that no fault is half way through
  /// let_write.
  template <typename Step>
  Status in_pause(std::atomic<uint64_t>& counter, Step step) {
    const uint64_t begin_ns = now_ns();
    std::optional<Status> status;
    server_.commands().run([&] {
      if (core_->state() == ImageState::kArmed) status = step();
    });
    counter.fetch_add(now_ns() - begin_ns, std::memory_order_relaxed);
    if (!status) return closed_or_wrong();
    if (!*status) core_->fail(status->error());
    return *status;
  }

  void begin_copying() {
    core_->begin_copying();
    parent_->stats.start(now_ns());
  }

  void start_server() {
    server_.commands().begin();
    const SignalsBlocked blocked;
    server_thread_ = std::thread([this] { server_.run(); });
  }

  void start_sweep() {
    parent_->sweep_ended.store(false, std::memory_order_relaxed);
    const SignalsBlocked blocked;
    sweep_thread_ = std::thread([this] { sweep_.run(); });
  }

  void end(ImageCore::Stop stop) {
    core_->request_stop(stop);
    inject_point(wire::InjectPoint::kImageStop);
    const std::lock_guard lock(steps_mutex_);
    if (sweep_thread_.joinable()) sweep_thread_.join();
    if (server_thread_.joinable()) {
      server_thread_.join();
    } else if (!is_ended_ && core_->resume() && core_->state() == ImageState::kIdle &&
               stop == ImageCore::Stop::kLetGo) {
      // An earlier process protected the parent, and this capture is given up before it has resumed.
      guard_.let_go();
    }
    is_ended_ = true;
    core_->finish_close();
  }

  std::unique_ptr<ImageCore> core_;
  std::unique_ptr<ParentMemory> parent_;
  ParentGuard guard_;
  ParentSupply supply_;
  CloneServer server_;
  SweepThread sweep_;
  std::mutex steps_mutex_;  // guards arm, protect, seal, resume, and the end
  std::thread server_thread_;
  std::thread sweep_thread_;
  bool is_ended_ = false;
};

void CaptureThreads::counters(std::span<uint64_t, wire::kImageCounterCount> out) const {
  using wire::ImageCounter;
  const auto set = [&](ImageCounter counter, uint64_t value) { out[static_cast<size_t>(counter)] = value; };
  const auto get = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  const ParentCounters& counted = parent_->counters;
  set(ImageCounter::kPagesTotal, core_->fill().page_count());
  set(ImageCounter::kPagesCopied, core_->fill().pages_present());
  set(ImageCounter::kPagesZero, core_->fill().pages_zero());
  set(ImageCounter::kCopiedBytes, get(counted.copied_bytes));
  set(ImageCounter::kParentFaultCount, get(counted.parent_fault_count));
  set(ImageCounter::kParentFaultP50Ns, parent_->stats.percentile_ns(500));
  set(ImageCounter::kParentFaultP99Ns, parent_->stats.percentile_ns(990));
  set(ImageCounter::kParentFaultMaxNs, parent_->stats.max_ns());
  set(ImageCounter::kParentFaultWaitNs, parent_->stats.wait_ns());
  set(ImageCounter::kParentDegradedNs, parent_->stats.degraded_ns());
  set(ImageCounter::kCloneFaultCount, get(core_->clone_fault_count));
  set(ImageCounter::kCloneFaultP99Ns, core_->clone_stats.percentile_ns(990));
  set(ImageCounter::kNotedFaultCount, get(counted.noted_fault_count));
  set(ImageCounter::kRearmedPages, get(counted.rearmed_pages));
  set(ImageCounter::kArmNs, get(counted.arm_ns));
  set(ImageCounter::kProtectNs, get(counted.protect_ns));
  set(ImageCounter::kSealNs, get(counted.seal_ns));
  set(ImageCounter::kCopyNs, get(core_->copy_ns));
  set(ImageCounter::kCpuNs, get(counted.arm_cpu_ns) + get(core_->serve_cpu_ns) + get(counted.sweep_cpu_ns));
}

}  // namespace

Result<std::unique_ptr<ImageCapture>> ImageCapture::open(ImageConfig config) {
  if (Status good = ParentMemory::check(config.source, config.image); !good) return good.error();
  auto core = ImageCore::open(config.image, config.resume, std::move(config.on_edge));
  if (!core) return core.error();
  auto parent = ParentMemory::open(*core.value(), config.parent, config.source);
  if (!parent) return parent.error();
  auto capture = std::make_unique<CaptureThreads>(std::move(core).value(), std::move(parent).value());
  if (auto status = capture->open(); !status) return status.error();
  return std::unique_ptr<ImageCapture>(std::move(capture));
}

}  // namespace vmigrate::pager
