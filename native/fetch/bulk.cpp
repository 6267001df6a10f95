#include "fetch/bulk.hpp"

#include <poll.h>

#include <algorithm>
#include <utility>

#include "fetch/dirty_map_reader.hpp"

namespace vmigrate::pager {
namespace {

constexpr int kAheadNice = 5;
/// The VM may have stopped, and waits.
constexpr std::chrono::milliseconds kTakeBackTimeout{2000};

}  // namespace

BulkThread::BulkThread(FetchCore& core, PageSink& sink)
    : core_(core),
      sink_(&sink),
      fetches_(core.fill(), core.counters.prefetch_bytes, kBulkFetchesMax),
      maps_(core),
      prefetch_(core, maps_, rate_) {}

void BulkThread::run() {
  // Lower priority than demand, higher than other work: the guest is degraded until this thread is done.
  // Measured on two loaded cores, 256 MiB under random faults: +5 takes twice as long as -5, with no shorter
  // waits.
  set_up_thread("vmg-bulk", -5);
  is_held_.store(false, std::memory_order_relaxed);
  work_until_done();
  link_ = Link{};
  note_cpu_time();
  // R8 pairs with A8 in DemandThread::run: every ioctl of this thread before the ranges are unregistered.
  core_.bulk_ended.store(true, std::memory_order_release);
  core_.wake_demand();
}

void BulkThread::run_ahead(PageSink& sink) {
  // The VM runs, here and there: what is pushed must not take its processors.
  set_up_thread("vmg-ahead", kAheadNice);
  PageSink* const usual = std::exchange(sink_, &sink);
  work_until_done();
  sink_ = usual;
  // Nothing may be written into the pages any more if somebody ends the session now.
  if (!core_.fill().all_done() && !is_quiet()) {
    link_ = Link{};
    link_dropped_ = true;
  }
  note_cpu_time();
  cpu_ns_before_ += thread_cpu_ns();
}

Result<uint64_t> BulkThread::take_back(uint32_t round) {
  if (!is_quiet() || !link_.endpoint)
    return Error{ErrorCode::kInvalidArgument, 0, "pages are taken back before they were fetched"};
  const auto taken = take_back_written(core_, link_, round, kTakeBackTimeout);
  // First comes what was never fetched: what the VM has just written, it will soon write again.
  prefetch_.sweep_again();
  return taken;
}

void BulkThread::work_until_done() {
  // A page whose CONTINUE was deferred is present but may have waiters, so this thread stays until it is
  // done.
  while (!core_.owner().must_end() && !(core_.fill().all_done() && !sink_->has_deferred())) {
    if (is_held() && is_quiet()) break;
    bool worked = take_new_link();
    worked |= sink_->has_deferred() && sink_->retry();
    worked |= poll_completions();
    const uint64_t at_ns = now_ns();
    worked |= fetch(at_ns);
    worked |= sink_->show_some();
    if (!worked) sleep(at_ns);
  }
}

void BulkThread::hold(bool is_held) {
  // Nothing is handed over: the thread acts on the flag alone, and the wake-up makes it look.
  is_held_.store(is_held, std::memory_order_relaxed);
  core_.wake_lanes();
}

bool BulkThread::is_held() const {
  return is_held_.load(std::memory_order_relaxed);
}

void BulkThread::note_cpu_time() const {
  core_.counters.bulk_cpu_ns.store(cpu_ns_before_ + thread_cpu_ns(), std::memory_order_relaxed);
}

bool BulkThread::connected() const {
  return link_.endpoint && !link_dropped_ && core_.may_ask();
}

void BulkThread::drop_connection() {
  link_dropped_ = true;
  core_.report_lost(link_.epoch);
}

bool BulkThread::take_new_link() {
  if (core_.link_epoch() == link_.epoch) return false;
  link_ = Link{};  // first: the old endpoint must not write into pages that are fetched again
  link_ = core_.take_link(Lane::kBulk);
  link_dropped_ = false;
  fetches_.rewind();
  maps_.rewind();
  return true;
}

bool BulkThread::poll_completions() {
  if (!connected()) return false;
  std::array<transport::Completion, kCompletionBatchMax> completions;
  const size_t count = link_.endpoint->poll(completions);
  std::array<size_t, kCompletionBatchMax> finished;
  size_t finished_count = 0;
  bool lost = count == 0 && link_.endpoint->disconnected();
  for (size_t i = 0; i < count; ++i) {
    if (DataMapReader::owns(completions[i].tag)) {
      lost |= !maps_.complete(completions[i]);
      continue;
    }
    const FetchTable::Completed done = fetches_.complete(completions[i]);
    if (done.progress == FetchTable::Progress::kFinished) finished[finished_count++] = done.slot;
    // The root has every page.
    if (done.progress == FetchTable::Progress::kFailed || done.progress == FetchTable::Progress::kAbsent)
      core_.owner().fail(done.error);
    lost |= done.progress == FetchTable::Progress::kDisconnected;
  }
  // Runs that a vCPU waits for go first.
  const auto wanted = [this](size_t slot) {
    const Fetch& fetch = fetches_.get(slot);
    return sink_->is_awaited(fetch.region_index, fetch.run);
  };
  if (finished_count > 1) {
    std::stable_partition(finished.begin(), finished.begin() + static_cast<std::ptrdiff_t>(finished_count),
                          wanted);
  }
  uint64_t finished_bytes = 0;
  for (size_t i = 0; i < finished_count; ++i) finished_bytes += fetches_.get(finished[i]).length_bytes;
  if (finished_bytes != 0) rate_.note(finished_bytes, now_ns());
  for (size_t i = 0; i < finished_count; ++i) {
    const Fetch fetch = fetches_.get(finished[i]);
    fetches_.release(finished[i]);
    sink_->publish(fetch.region_index, fetch.run);
  }
  if (lost) drop_connection();
  return count != 0 || lost;
}

bool BulkThread::may_sweep(uint64_t at_ns) const {
  return !is_held() && core_.fetches_all.load(std::memory_order_relaxed) &&
         core_.nearer.holds_back_until_ns(at_ns) == 0;
}

bool BulkThread::fetch(uint64_t at_ns) {
  if (!connected()) return false;
  bool worked = false;
  if (maps_.due_ns() <= at_ns) {
    if (!maps_.step(link_, at_ns)) {
      drop_connection();
      return true;
    }
    worked = maps_.due_ns() == UINT64_MAX;
  }
  while (may_sweep(at_ns) && fetches_.free_count() != 0 && !fetches_.has_unposted() &&
         sink_->has_room(fetches_.used_count() + 1) &&
         fetches_.bytes() < prefetch_.in_flight_bytes_max(at_ns) && at_ns >= core_.bandwidth.due_ns()) {
    const auto claimed = prefetch_.claim_next(at_ns);
    if (!claimed) break;
    if (fetches_.used_count() == 0) rate_.begin(at_ns);
    fetches_.start(claimed->region_index, claimed->run);
    core_.bandwidth.take(at_ns, claimed->run.count * core_.fill().region(claimed->region_index).page_bytes());
    worked = true;
    if (!fetches_.post(link_)) {
      drop_connection();
      return true;
    }
  }
  if (fetches_.has_unposted() && !fetches_.post(link_)) drop_connection();
  return worked;
}

/// Descriptors are level-triggered. A fault that asks for more chunks needs no wake, because it comes with a
/// completion. `at_ns` is the time at which nothing was due: if a limit has passed since, the sleep must end
/// at once.
void BulkThread::sleep(uint64_t at_ns) {
  note_cpu_time();
  uint64_t due_ns = UINT64_MAX;
  std::array<pollfd, 2> watched{{{.fd = core_.bulk_wake.fd(), .events = POLLIN, .revents = 0}, {}}};
  nfds_t watched_count = 1;
  if (connected()) {
    drop_messages(*link_.endpoint);
    watched[watched_count++] = {.fd = link_.endpoint->event_fd(), .events = POLLIN, .revents = 0};
    due_ns = maps_.due_ns();
    if (core_.bandwidth.due_ns() > at_ns) due_ns = std::min(due_ns, core_.bandwidth.due_ns());
    const uint64_t held_until_ns = core_.nearer.holds_back_until_ns(at_ns);
    if (held_until_ns != 0 && core_.fetches_all.load(std::memory_order_relaxed))
      due_ns = std::min(due_ns, held_until_ns);
  }
  // connect() signals a new connection.
  if (sink_->has_deferred() || (connected() && fetches_.has_unposted()))
    due_ns = std::min(due_ns, at_ns + kRetryMs * 1'000'000u);
  timespec timeout{};
  if (due_ns != UINT64_MAX) {
    const uint64_t wait_ns = due_ns > at_ns ? due_ns - at_ns : 0;
    timeout.tv_sec = static_cast<time_t>(wait_ns / 1'000'000'000u);
    timeout.tv_nsec = static_cast<long>(wait_ns % 1'000'000'000u);
  }
  if (::ppoll(watched.data(), watched_count, due_ns == UINT64_MAX ? nullptr : &timeout, nullptr) < 0 &&
      errno != EINTR) {
    core_.owner().fail(system_error("ppoll"));
  }
  core_.bulk_wake.drain();
}

}  // namespace vmigrate::pager
