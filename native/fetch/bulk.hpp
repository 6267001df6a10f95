#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "fetch/core.hpp"
#include "fetch/data_map_reader.hpp"
#include "fetch/fetch_table.hpp"
#include "fetch/page_sink.hpp"
#include "fetch/prefetch.hpp"

namespace vmigrate::pager {

/// The thread that reads from the source which pages are holes, and fetches the other pages before a vCPU
/// asks for them. run() is the thread's whole life; it ends when every page is here. Before it, while the VM
/// still runs on the source, there may be threads that fetch ahead. One thread at a time uses this object.
class BulkThread {
 public:
  BulkThread(FetchCore& core, PageSink& sink);
  void run();

  /// The life of a thread that fetches ahead: until every page is here, it is held, or the session must end.
  /// It waits for another connection if one is lost. `sink` shows the pages to nobody.
  void run_ahead(PageSink& sink);
  /// Lets run_ahead end when what is in flight has come, or, with false, go on. Any thread.
  void hold(bool is_held);
  /// True if no page is in flight and the holes of all regions are known. Then pages may be taken back: a map
  /// of holes that is older than a write would turn the page into a zero page afterwards.
  bool is_quiet() const { return fetches_.used_count() == 0 && maps_.finished(); }
  /// Makes the pages absent again that the VM has written since (dirty_map_reader.hpp). kInvalidArgument if
  /// run_ahead has not ended in quiet.
  Result<uint64_t> take_back(uint32_t round);

 private:
  void work_until_done();
  bool is_held() const;
  bool take_new_link();
  bool connected() const;
  bool poll_completions();
  bool fetch(uint64_t at_ns);
  bool may_sweep(uint64_t at_ns) const;
  void drop_connection();
  void sleep(uint64_t at_ns);
  void note_cpu_time() const;

  FetchCore& core_;
  PageSink* sink_;
  FetchTable fetches_;
  DataMapReader maps_;
  ServiceRate rate_;
  Prefetch prefetch_;
  Link link_;
  bool link_dropped_ = false;
  std::atomic<bool> is_held_{false};
  uint64_t cpu_ns_before_ = 0;  ///< of threads that have ended
};

}  // namespace vmigrate::pager
