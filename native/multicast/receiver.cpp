#include "multicast/receiver.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/session_state.hpp"
#include "base/thread_util.hpp"
#include "multicast/datagram/limits.hpp"
#include "multicast/datagram/writer.hpp"
#include "multicast/intake.hpp"

namespace vmigrate::multicast {
namespace {

using pager::now_ns;

/// The first sequence of a member's reports. It grows over restarts, so that a receiver that comes back under
/// the same number uses no nonce again.
uint64_t first_report_sequence() {
  return pager::clock_ns(CLOCK_REALTIME);
}

class ReceiverThread final : public MulticastReceiver, private DatagramVisitor {
 public:
  ReceiverThread(ReceiverConfig config, std::unique_ptr<DatagramPort> port,
                 std::unique_ptr<DatagramAuth> auth)
      : sink_(*config.sink),
        session_(config.group.session),
        on_edge_(config.on_edge ? std::move(config.on_edge) : [] {}),
        port_(std::move(port)),
        auth_(std::move(auth)),
        intake_(*auth_, session_, sink_),
        writer_(*auth_, session_, config.member, first_report_sequence()) {}
  ~ReceiverThread() override { close(); }

  Status begin();
  void close() override;
  ReceiverState state() const override { return state_.get(); }
  // A22 pairs with R22 at the end of run: all that the thread has done before.
  bool has_ended() const override { return has_ended_.load(std::memory_order_acquire); }
  std::optional<Error> failure() const override { return state_.failure(); }
  ReceiverCounters counters() const override;

 private:
  void run();
  Status receive_all();
  bool look_at_time(uint64_t at_ns);
  void on_datagram(std::span<const std::byte> datagram) override;
  void report(uint64_t at_ns);
  Status sleep(uint64_t at_ns);
  void enter(ReceiverState next);
  void publish_counters();
  bool must_stop() const { return stop_.load(std::memory_order_relaxed) || sink_.must_end(); }

  PageSink& sink_;
  const uint64_t session_;
  const std::function<void()> on_edge_;
  std::unique_ptr<DatagramPort> port_;
  std::unique_ptr<DatagramAuth> auth_;
  Intake intake_;
  DatagramWriter writer_;
  uint64_t begun_ns_ = 0, heard_ns_ = 0;           ///< heard_ns_: of the last genuine datagram; 0: none yet
  uint64_t reported_ns_ = 0, reported_of_ns_ = 0;  ///< the last report, and heard_ns_ as it was then
  uint64_t at_ns_ = 0;

  std::mutex steps_mutex_;  // guards the join
  std::thread thread_;
  pager::WakeEvent wake_;
  std::atomic<bool> stop_{false}, has_ended_{false};
  SessionState<ReceiverState> state_{ReceiverState::kWaiting};
  mutable std::mutex counters_mutex_;  // guards published_, which changes once for each batch
  ReceiverCounters published_;
};

Status ReceiverThread::begin() {
  if (!wake_.valid()) return system_error("eventfd");
  begun_ns_ = now_ns();
  const pager::SignalsBlocked blocked;
  thread_ = std::thread([this] { run(); });
  return ok();
}

void ReceiverThread::close() {
  stop_.store(true, std::memory_order_relaxed);
  wake_.signal();
  const std::lock_guard lock(steps_mutex_);
  if (thread_.joinable()) thread_.join();
}

void ReceiverThread::enter(ReceiverState next) {
  using enum ReceiverState;
  if (state() != next && state_.advance({kWaiting, kReceiving, kSilent}, next)) on_edge_();
}

void ReceiverThread::run() {
  // As bulk has: the clones are degraded until their pages are here.
  pager::set_up_thread("vmg-mcastrecv", -5);
  if (const Status received = receive_all(); !received) {
    using enum ReceiverState;
    state_.fail({kWaiting, kReceiving, kSilent}, kFailed, received.error());
  }
  publish_counters();
  port_.reset();  // leaves the group
  // R22 pairs with A22 in has_ended.
  has_ended_.store(true, std::memory_order_release);
  on_edge_();
}

Status ReceiverThread::receive_all() {
  while (!must_stop()) {
    at_ns_ = now_ns();
    const auto count = port_->receive(*this);
    sink_.flush();
    if (!count) return count.error();
    if (count.value() == 0 && intake_.has_end()) break;
    if (!look_at_time(at_ns_)) return ok();
    if (count.value() == 0) {
      publish_counters();
      if (auto slept = sleep(at_ns_); !slept) return slept;
    }
  }
  // The sender's statistics are complete then.
  if (heard_ns_ != 0) report(now_ns());
  publish_counters();  // whoever sees the end sees them all
  if (intake_.has_end() || sink_.must_end()) enter(ReceiverState::kEnded);
  return ok();
}

/// Reports, and notices silence. False: nobody will send any more.
bool ReceiverThread::look_at_time(uint64_t at_ns) {
  const bool is_news = heard_ns_ > reported_of_ns_;
  if (heard_ns_ != 0 && at_ns - reported_ns_ >= (is_news ? kReportNs : kIdleReportNs)) {
    report(at_ns);
    publish_counters();
  }
  if (heard_ns_ == 0) {
    if (at_ns - begun_ns_ < kWaitingNs) return true;
    enter(ReceiverState::kSilent);
    return false;
  }
  const uint64_t silent_ns = at_ns - std::min(at_ns, heard_ns_);
  enter(silent_ns >= kSilentNs ? ReceiverState::kSilent : ReceiverState::kReceiving);
  return silent_ns < kForsakenNs;
}

void ReceiverThread::on_datagram(std::span<const std::byte> datagram) {
  if (!intake_.take(datagram)) return;
  heard_ns_ = at_ns_;
  port_->adopt_source();
}

void ReceiverThread::report(uint64_t at_ns) {
  reported_ns_ = at_ns;
  reported_of_ns_ = heard_ns_;
  wire::MulticastReport report{};
  report.clock_ns = at_ns;
  const ReceiverCounters counters = intake_.counters();
  report.highest_sequence = intake_.highest_sequence();
  report.received_datagrams = counters.received_datagrams;
  report.received_bytes = counters.received_bytes;
  std::array<uint64_t, wire::kMulticastWantedMax> wanted{};
  static_assert(sizeof(wanted) == sizeof(report.wanted));
  report.wanted_count = static_cast<uint32_t>(sink_.wanted(wanted));
  std::memcpy(report.wanted, wanted.data(), sizeof(wanted));
  std::array<std::byte, sizeof(DatagramHeader) + sizeof(report)> datagram;
  if (const auto bytes = writer_.write(datagram, DatagramKind::kReport, report); !bytes.empty())
    port_->answer(bytes);
}

/// Until a datagram comes, or it is time to look again. A session that ends does not wake us, so it is looked
/// at now and then.
Status ReceiverThread::sleep(uint64_t at_ns) {
  const bool is_news = heard_ns_ > reported_of_ns_;
  const uint64_t due_ns = is_news ? reported_ns_ + kReportNs : at_ns + kIdleReportNs;
  std::array<pollfd, 2> watched{{{.fd = wake_.fd(), .events = POLLIN, .revents = 0},
                                 {.fd = port_->event_fd(), .events = POLLIN, .revents = 0}}};
  const timespec timeout{0, due_ns > at_ns ? static_cast<long>(std::min(due_ns - at_ns, kIdleReportNs)) : 0};
  if (::ppoll(watched.data(), watched.size(), &timeout, nullptr) < 0 && errno != EINTR)
    return system_error("ppoll");
  return ok();
}

void ReceiverThread::publish_counters() {
  ReceiverCounters counters = intake_.counters();
  counters.cpu_ns = pager::thread_cpu_ns();
  const std::lock_guard lock(counters_mutex_);
  published_ = counters;
}

ReceiverCounters ReceiverThread::counters() const {
  const std::lock_guard lock(counters_mutex_);
  return published_;
}

}  // namespace

Result<std::unique_ptr<MulticastReceiver>> MulticastReceiver::open(ReceiverConfig config) {
  if (config.member == kSenderMember || config.member == wire::kMulticastProbeMember)
    return Error{ErrorCode::kInvalidArgument, 0, "number of a member"};
  auto auth = DatagramAuth::create(config.group.key);
  if (!auth) return auth.error();
  std::unique_ptr<DatagramPort> port = std::move(config.port);
  if (!port) {
    auto opened = open_port(config.group, Role::kReceiver);
    if (!opened) return opened.error();
    port = std::move(opened).value();
  }
  auto receiver =
      std::make_unique<ReceiverThread>(std::move(config), std::move(port), std::move(auth).value());
  if (auto status = receiver->begin(); !status) return status.error();
  return std::unique_ptr<MulticastReceiver>(std::move(receiver));
}

}  // namespace vmigrate::multicast
