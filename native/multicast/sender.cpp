#include "multicast/sender.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "base/session_state.hpp"
#include "base/thread_util.hpp"
#include "multicast/clock_pace.hpp"
#include "multicast/datagram/cut.hpp"
#include "multicast/datagram/writer.hpp"

namespace vmigrate::multicast {
namespace {

using pager::now_ns;

/// Time whose bytes are sent with one call, so that slow multicasts are even ones.
constexpr uint64_t kBatchNs = kMs;

class SenderThread final : public MulticastSender {
 public:
  SenderThread(SenderConfig config, std::unique_ptr<DatagramPort> port, std::unique_ptr<DatagramAuth> auth)
      : on_edge_(config.on_edge ? std::move(config.on_edge) : [] {}),
        port_(std::move(port)),
        auth_(std::move(auth)),
        cut_(cut_page(port_->datagram_bytes_max())),
        order_(std::move(config.order)),
        pacer_(PacerOptions{.limit_bytes_per_s = config.bandwidth_bytes_per_s}),
        writer_(*auth_, config.group.session, kSenderMember, 1),
        reports_(*auth_, config.group.session, pacer_) {}
  ~SenderThread() override { close(); }

  Status open(std::span<const pager::RegionFileConfig> image);
  Status start() override;
  void close() override;
  SenderState state() const override { return state_.get(); }
  std::optional<Error> failure() const override { return state_.failure(); }
  SenderCounters counters() const override;
  std::vector<MemberStatistics> members() const override { return reports_.members(); }

 private:
  void run();
  void release();
  Status send_all();
  Status send_batch(uint64_t count_max);
  Status read_pages(const PagePlan::Piece& piece, std::byte* to);
  void send_end_marks();
  Status hear_and_wait_until(uint64_t due_ns);
  uint64_t pages_due() const;
  bool is_unheard(uint64_t at_ns) const {
    return at_ns - std::max(reports_.heard_ns(), begun_ns_) > kUnheardNs;
  }
  // Relaxed: only the flag itself is looked at; the thread is joined before anything is taken from it.
  bool must_stop() const { return stop_.load(std::memory_order_relaxed); }

  const std::function<void()> on_edge_;
  std::unique_ptr<DatagramPort> port_;
  std::unique_ptr<DatagramAuth> auth_;
  const Cut cut_;
  std::vector<std::unique_ptr<memory::Region>> regions_;
  std::vector<uint32_t> order_;
  PagePlan plan_;
  Pacer pacer_;
  DatagramWriter writer_;
  ReportListener reports_;
  ClockPace pace_{kCatchUpNs};
  std::vector<std::byte> pages_;  ///< as they are in the files
  /// Datagrams of one length, one behind the other: a chain.
  struct Chain {
    std::vector<std::byte> bytes;
    size_t used_bytes = 0;
  };
  Chain long_, short_;
  uint64_t begun_ns_ = 0;

  std::mutex steps_mutex_;  // guards start and close
  std::thread thread_;
  pager::WakeEvent wake_;
  std::atomic<bool> stop_{false};
  SessionState<SenderState> state_{SenderState::kWaiting};
  std::atomic<uint64_t> sent_bytes_{0}, sent_pages_{0}, pages_total_{0}, sent_datagrams_{0}, rate_{0},
      cpu_ns_{0};
};

Status SenderThread::open(std::span<const pager::RegionFileConfig> image) {
  if (!wake_.valid()) return system_error("eventfd");
  if (cut_.part_count == 0 || cut_.part_count > kBatchDatagramsMax)
    return Error{ErrorCode::kInvalidArgument, 0, "the MTU is too small for a multicast"};
  if (image.empty() || image.size() > wire::kPreloadRegionsMax)
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  for (const pager::RegionFileConfig& config : image) {
    if (config.page_bytes != kPageBytes)
      return Error{ErrorCode::kUnsupported, 0, "multicast of pages that are not of 4 KiB"};
    auto region =
        memory::Region::open(config.path, config.length_bytes, config.page_bytes, memory::Mode::kReadOnly);
    if (!region) return region.error();
    regions_.push_back(std::move(region).value());
  }
  return ok();
}

Status SenderThread::start() {
  const std::lock_guard lock(steps_mutex_);
  if (!state_.advance({SenderState::kWaiting}, SenderState::kSending)) {
    const bool is_closed = state() == SenderState::kClosed;
    return Error{is_closed ? ErrorCode::kClosed : ErrorCode::kInvalidArgument, 0, "start in this state"};
  }
  const pager::SignalsBlocked blocked;
  thread_ = std::thread([this] { run(); });
  on_edge_();
  return ok();
}

void SenderThread::close() {
  stop_.store(true, std::memory_order_relaxed);
  wake_.signal();
  const std::lock_guard lock(steps_mutex_);
  if (thread_.joinable()) thread_.join();
  release();
  static_cast<void>(state_.advance({SenderState::kWaiting, SenderState::kSending}, SenderState::kClosed));
}

/// Frees the port and the files, which nobody needs when the thread has ended.
void SenderThread::release() {
  port_.reset();
  regions_.clear();
  plan_ = {};
  pages_ = {};
  long_ = short_ = {};
}

void SenderThread::run() {
  // Below what serves guests: those who wait for a page get it by another way.
  pager::set_up_thread("vmg-mcastsend", 0);
  const Status sent = send_all();
  if (writer_.next_sequence() > 1) send_end_marks();
  release();
  cpu_ns_.store(pager::thread_cpu_ns(), std::memory_order_relaxed);
  rate_.store(0, std::memory_order_relaxed);
  const bool has_changed = sent.ok()
                               ? !must_stop() && state_.advance({SenderState::kSending}, SenderState::kEnded)
                               : state_.fail({SenderState::kSending}, SenderState::kFailed, sent.error());
  if (has_changed) on_edge_();
}

Status SenderThread::send_all() {
  auto plan = PagePlan::of(regions_, std::move(order_));
  if (!plan) return plan.error();
  plan_ = std::move(plan).value();
  pages_total_.store(plan_.page_count(), std::memory_order_relaxed);
  const uint64_t page_bytes = kPageBytes + cut_.part_count * sizeof(DatagramHeader);
  const uint64_t pages_max =
      std::max<uint64_t>(1, std::min(kBatchBytesMax / page_bytes, kBatchDatagramsMax / cut_.part_count));
  pages_.resize(pages_max * kPageBytes);
  long_.bytes.resize(pages_max * page_bytes);
  short_.bytes.resize(pages_max * page_bytes);
  begun_ns_ = now_ns();
  while (!plan_.is_done() && !must_stop()) {
    const uint64_t at_ns = now_ns();
    if (is_unheard(at_ns)) return ok();
    const uint64_t rate = pacer_.rate_bytes_per_s(at_ns);
    rate_.store(rate, std::memory_order_relaxed);
    if (!pace_.is_due(at_ns)) {
      if (auto heard = hear_and_wait_until(pace_.next_ns()); !heard) return heard;
      continue;
    }
    const uint64_t count = std::clamp<uint64_t>(rate * kBatchNs / 1'000'000'000u / page_bytes, 1, pages_max);
    const uint64_t before = sent_bytes_.load(std::memory_order_relaxed);
    if (auto sent = send_batch(count); !sent) return sent;
    const uint64_t after = sent_bytes_.load(std::memory_order_relaxed);
    pace_.note(after - before, rate, at_ns);
    pacer_.sent(after, at_ns);
    if (auto heard = reports_.listen(*port_, plan_, writer_.next_sequence(), at_ns); !heard) return heard;
  }
  return ok();
}

/// Sends up to so many pages, with one call for each length of datagrams.
Status SenderThread::send_batch(uint64_t count_max) {
  long_.used_bytes = short_.used_bytes = 0;
  uint64_t page_count = 0;
  while (page_count < count_max) {
    const auto piece = plan_.next(count_max - page_count);
    if (!piece) break;
    if (auto read = read_pages(*piece, pages_.data()); !read) return read;
    for (uint64_t i = 0; i < piece->run.count; ++i) {
      const std::byte* page = pages_.data() + i * kPageBytes;
      const uint64_t page_offset_bytes = (raw(piece->run.first) + i) * kPageBytes;
      for (uint32_t part = 0; part < cut_.part_count; ++part) {
        Chain& chain = part < cut_.long_count ? long_ : short_;
        const uint32_t part_bytes = cut_.part_bytes(part);
        const std::span datagram(chain.bytes.data() + chain.used_bytes, sizeof(DatagramHeader) + part_bytes);
        std::memcpy(datagram.data() + sizeof(DatagramHeader), page + cut_.offset_bytes(part), part_bytes);
        if (!writer_.finish(datagram, DatagramKind::kData, static_cast<uint16_t>(piece->region_index),
                            page_offset_bytes + cut_.offset_bytes(part))) {
          return Error{ErrorCode::kSystem, 0, "AES-GCM"};
        }
        chain.used_bytes += datagram.size();
      }
    }
    page_count += piece->run.count;
  }
  const size_t long_bytes = sizeof(DatagramHeader) + cut_.long_bytes;
  for (const auto& [chain, datagram_bytes] :
       {std::pair{&long_, long_bytes}, {&short_, long_bytes - wire::kDatagramGrainBytes}}) {
    if (chain->used_bytes == 0) continue;
    if (auto sent = port_->send({chain->bytes.data(), chain->used_bytes}, datagram_bytes); !sent) return sent;
  }
  const uint64_t datagrams = page_count * cut_.part_count;
  sent_bytes_.fetch_add(long_.used_bytes + short_.used_bytes + datagrams * kUdpHeaderBytes,
                        std::memory_order_relaxed);
  sent_datagrams_.fetch_add(datagrams, std::memory_order_relaxed);
  sent_pages_.fetch_add(page_count, std::memory_order_relaxed);
  return ok();
}

/// By system calls: a file that shrinks meanwhile gives an error, and no signal.
Status SenderThread::read_pages(const PagePlan::Piece& piece, std::byte* to) {
  const uint64_t length_bytes = piece.run.count * kPageBytes;
  const uint64_t from_bytes = raw(piece.run.first) * kPageBytes;
  for (uint64_t done = 0; done < length_bytes;) {
    const ssize_t got = ::pread(regions_[piece.region_index]->fd(), to + done, length_bytes - done,
                                static_cast<off_t>(from_bytes + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return system_error("pread region");
    if (got == 0) return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
    done += static_cast<uint64_t>(got);
  }
  return ok();
}

/// Listens to the receivers until then. Reports end the sleep early, because they may ask for a page.
Status SenderThread::hear_and_wait_until(uint64_t due_ns) {
  const uint64_t at_ns = now_ns();
  if (at_ns < due_ns) {
    std::array<pollfd, 2> watched{{{.fd = wake_.fd(), .events = POLLIN, .revents = 0},
                                   {.fd = port_->event_fd(), .events = POLLIN, .revents = 0}}};
    const timespec timeout{0, static_cast<long>(std::min<uint64_t>(due_ns - at_ns, 100 * kMs))};
    if (::ppoll(watched.data(), watched.size(), &timeout, nullptr) < 0 && errno != EINTR)
      return system_error("ppoll");
    cpu_ns_.store(pager::thread_cpu_ns(), std::memory_order_relaxed);
  }
  return reports_.listen(*port_, plan_, writer_.next_sequence(), now_ns());
}

/// Several, because each may be lost. Whoever closes the sender waits for a few only.
void SenderThread::send_end_marks() {
  const wire::MulticastEnd end{sent_datagrams_.load(std::memory_order_relaxed),
                               sent_pages_.load(std::memory_order_relaxed)};
  std::array<std::byte, sizeof(DatagramHeader) + sizeof(end)> datagram;
  for (int i = 0; i < kEndMarks; ++i) {
    const auto bytes = writer_.write(datagram, DatagramKind::kEnd, end);
    if (bytes.empty() || !port_->send(bytes, bytes.size())) return;
    sent_bytes_.fetch_add(bytes.size() + kUdpHeaderBytes, std::memory_order_relaxed);
    if (must_stop() && i >= 2) return;
    const uint64_t until_ns = now_ns() + (must_stop() ? kMs : kEndMarkNs);
    while (now_ns() < until_ns) {
      if (!hear_and_wait_until(until_ns)) return;
      if (must_stop()) break;
    }
  }
}

SenderCounters SenderThread::counters() const {
  const auto get = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  return {get(sent_bytes_),     get(sent_pages_), get(pages_total_),
          get(sent_datagrams_), get(rate_),       get(cpu_ns_)};
}

}  // namespace

Result<std::unique_ptr<MulticastSender>> MulticastSender::open(SenderConfig config) {
  auto auth = DatagramAuth::create(config.group.key);
  if (!auth) return auth.error();
  std::unique_ptr<DatagramPort> port = std::move(config.port);
  if (!port) {
    auto opened = open_port(config.group, Role::kSender);
    if (!opened) return opened.error();
    port = std::move(opened).value();
  }
  const auto image = std::move(config.image);
  auto sender = std::make_unique<SenderThread>(std::move(config), std::move(port), std::move(auth).value());
  if (auto status = sender->open(image); !status) return status.error();
  return std::unique_ptr<MulticastSender>(std::move(sender));
}

}  // namespace vmigrate::multicast
