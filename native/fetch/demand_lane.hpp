#pragma once

#include "base/watcher.hpp"
#include "fetch/core.hpp"
#include "fetch/fetch_table.hpp"
#include "fetch/page_sink.hpp"

namespace vmigrate::pager {

/// The lane of a fetch whose pages are waited for: it is part of the thread that reads faults, and keeps that
/// thread's connection. Bulk's lane is a thread of its own (bulk.hpp).
class DemandLane {
 public:
  /// All arguments must outlive it. The endpoint's descriptor is watched with `tag`. `spins`: the thread
  /// polls a device for a while, and calls stop_polling before it sleeps.
  DemandLane(FetchCore& core, PageSink& sink, Watcher& watcher, uint32_t tag, bool spins);

  bool connected() const { return link_.endpoint && core_.may_ask(); }
  /// A device has a READ of ours.
  bool awaits_device() const {
    return connected() && fetches_.used_count() != 0 && link_.endpoint->is_device();
  }
  /// Descriptor of the connection; -1 if there is none.
  int event_fd() const { return link_.endpoint ? link_.endpoint->event_fd() : -1; }
  size_t free_count() const { return fetches_.free_count(); }
  size_t used_count() const { return fetches_.used_count(); }
  bool has_unposted() const { return fetches_.has_unposted(); }

  /// The caller has claimed the run. There must be a free place.
  void start(uint32_t region_index, PageRun run) { fetches_.start(region_index, run); }
  /// Posts what has been started, as far as the transport accepts it.
  void post();
  /// Takes over a new connection, and posts all fetches again on it. True if there was one.
  bool take_new_link();
  /// Publishes what has arrived. True if anything has.
  bool poll();
  /// Bulk may report a loss first. Then nothing is polled or posted here any more, so a connection that stays
  /// readable would end every sleep at once.
  void drop_lost_link();
  /// The thread is about to sleep.
  void stop_polling() {
    if (!link_.endpoint) return;
    drop_messages(*link_.endpoint);
    link_.endpoint->set_polled(false);
  }
  /// The thread ends.
  void close() { drop_link(); }

 private:
  void drop_connection();
  void drop_link();

  FetchCore& core_;
  PageSink& sink_;
  Watcher& watcher_;
  const uint32_t tag_;
  const bool spins_;
  FetchTable fetches_;
  Link link_;
};

}  // namespace vmigrate::pager
