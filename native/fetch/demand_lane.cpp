#include "fetch/demand_lane.hpp"

#include <array>

#include "fetch/limits.hpp"

namespace vmigrate::pager {

DemandLane::DemandLane(FetchCore& core, PageSink& sink, Watcher& watcher, uint32_t tag, bool spins)
    : core_(core),
      sink_(sink),
      watcher_(watcher),
      tag_(tag),
      spins_(spins),
      fetches_(core.fill(), core.counters.demand_bytes, kDemandFetchesMax) {}

void DemandLane::drop_link() {
  if (!link_.endpoint) return;
  watcher_.unwatch(link_.endpoint->event_fd());
  link_.endpoint.reset();
}

/// A broken connection stays readable for ever and never recovers, so it is no longer watched. Its fetches
/// are posted again when the next connection comes, if one is needed.
void DemandLane::drop_connection() {
  drop_link();
  core_.report_lost(link_.epoch);
}

void DemandLane::drop_lost_link() {
  if (core_.is_lost()) drop_link();
}

bool DemandLane::take_new_link() {
  if (core_.link_epoch() == link_.epoch) return false;
  const bool reconnected = link_.epoch != 0;
  drop_link();  // first: the old endpoint must not write into pages that are fetched again
  link_ = core_.take_link(Lane::kDemand);
  fetches_.rewind();
  if (link_.endpoint) {
    const Status watched = watcher_.watch(link_.endpoint->event_fd(), tag_);
    if (!watched) core_.owner().fail(watched.error());
  }
  post();
  if (reconnected) core_.owner().on_connection();
  return true;
}

bool DemandLane::poll() {
  if (!connected()) return false;
  std::array<transport::Completion, kCompletionBatchMax> completions;
  const size_t count = link_.endpoint->poll(completions);
  for (size_t i = 0; i < count; ++i) {
    const FetchTable::Completed done = fetches_.complete(completions[i]);
    switch (done.progress) {
      case FetchTable::Progress::kMore:
        break;
      case FetchTable::Progress::kFinished: {
        const Fetch fetch = fetches_.get(done.slot);
        fetches_.release(done.slot);
        sink_.publish(fetch.region_index, fetch.run);
        break;
      }
      case FetchTable::Progress::kDisconnected:
        drop_connection();
        return true;
      case FetchTable::Progress::kAbsent:  // the root has every page
      case FetchTable::Progress::kFailed:
        core_.owner().fail(done.error);
        return true;
    }
  }
  if (count != 0) return true;
  if (link_.endpoint->disconnected()) {
    drop_connection();
    return true;
  }
  return false;
}

void DemandLane::post() {
  if (!connected()) return;
  if (spins_ && awaits_device()) link_.endpoint->set_polled(true);
  if (!fetches_.post(link_)) drop_connection();
}

}  // namespace vmigrate::pager
