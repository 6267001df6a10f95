#pragma once

#include <array>
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

  /// The life of a thread that fetches ahead: until every page is here, or the session must end. It waits for
  /// another connection if one is lost. `sink` shows the pages to nobody.
  void run_ahead(PageSink& sink);
  /// Makes the pages absent again that the VM has written since (dirty_map_reader.hpp). kInvalidArgument if
  /// run_ahead has not fetched every page.
  Result<uint64_t> take_back(uint32_t round);

 private:
  void work_until_done();
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
  uint64_t cpu_ns_before_ = 0;  ///< of threads that have ended
};

}  // namespace vmigrate::pager
