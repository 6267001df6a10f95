#include "target/core.hpp"

#include "vm/fit.hpp"

namespace vmigrate::pager {

TargetState TargetCore::state() const {
  const TargetState state = state_.get();
  const bool needs_source = state == TargetState::kFilling || state == TargetState::kAhead;
  return needs_source && fetch_->is_lost() ? TargetState::kDisconnected : state;
}

bool TargetCore::must_end() const {
  // A7 pairs with R7 in request_stop; nothing but the flag itself is handed over.
  return stop_.load(std::memory_order_acquire) || state_.get() == TargetState::kFailed;
}

void TargetCore::fail(const Error& error) {
  if (!state_.fail({TargetState::kAhead, TargetState::kFilling}, TargetState::kFailed, error)) return;
  fetch_->end();
  fetch_->wake_lanes();
  on_edge_();
}

void TargetCore::complete(uint64_t at_ns) {
  const bool changed = state_.advance({TargetState::kFilling}, TargetState::kComplete, [&] {
    counters.completed_ns.store(at_ns > start_ns_ ? at_ns - start_ns_ : 1, std::memory_order_relaxed);
  });
  if (changed) on_edge_();
}

Error TargetCore::wrong_state(const char* what) const {
  return {state_.get() == TargetState::kClosed ? ErrorCode::kClosed : ErrorCode::kInvalidArgument, 0, what};
}

Status TargetCore::attach(SourceEndpoints endpoints) {
  const TargetState at = state_.get();
  if (at != TargetState::kIdle && at != TargetState::kAhead && at != TargetState::kFilling)
    return wrong_state("connect in this state");
  // A session that takes over does not try its path: its VM waits.
  if (resume_) endpoints.probe_timeout = {};
  return fetch_->attach(std::move(endpoints));
}

Status TargetCore::begin_ahead() {
  if (fetch_->link_epoch() == 0) return Error{ErrorCode::kInvalidArgument, 0, "fetch ahead before connect"};
  if (!state_.advance({TargetState::kIdle}, TargetState::kAhead))
    return wrong_state("fetch ahead in this state");
  has_fetched_ahead_.store(true, std::memory_order_relaxed);
  on_edge_();
  return ok();
}

void TargetCore::end_ahead(bool is_quiet) {
  if (fill_->all_done() || is_quiet)
    static_cast<void>(state_.advance({TargetState::kAhead}, TargetState::kIdle));
  on_edge_();
}

Status TargetCore::begin() {
  // If every page was here when the session took over, it no longer needs a source.
  if (state_.get() == TargetState::kIdle && fetch_->link_epoch() == 0 && !fill_->all_done()) {
    return Error{ErrorCode::kInvalidArgument, 0, "start before connect"};
  }
  const bool begun = state_.advance({TargetState::kIdle}, TargetState::kFilling, [&] {
    start_ns_ = now_ns();
    stats.start(start_ns_);
    counters.ahead_bytes.store(fetch_->counters.prefetch_bytes.load(std::memory_order_relaxed),
                               std::memory_order_relaxed);
    fetch_->begin();
  });
  return begun ? ok() : Status(wrong_state("start in this state"));
}

void TargetCore::request_stop() {
  // R7 pairs with A7 in must_end.
  stop_.store(true, std::memory_order_release);
  fetch_->wake_lanes();
}

void TargetCore::finish_close() {
  fetch_->end();
  static_cast<void>(
      state_.advance({TargetState::kIdle, TargetState::kAhead, TargetState::kFilling}, TargetState::kClosed));
}

std::optional<PageKey> TargetCore::locate(uint32_t descriptor_index, HostAddr address) const {
  const MappedRange* range = find_range(*vm_, descriptor_index, address);
  if (range == nullptr) return std::nullopt;
  return key_in(*range, address, fill_->region(range->region_index).page_bytes());
}

}  // namespace vmigrate::pager
