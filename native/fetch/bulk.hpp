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
/// asks for them. run() is the thread's whole life; it ends when every page is here.
class BulkThread {
 public:
  BulkThread(FetchCore& core, PageSink& sink);
  void run();

 private:
  bool take_new_link();
  bool connected() const;
  bool poll_completions();
  bool fetch(uint64_t at_ns);
  bool may_sweep(uint64_t at_ns) const;
  void drop_connection();
  void sleep(uint64_t at_ns);

  FetchCore& core_;
  PageSink& sink_;
  FetchTable fetches_;
  DataMapReader maps_;
  ServiceRate rate_;
  Prefetch prefetch_;
  Link link_;
  bool link_dropped_ = false;
};

}  // namespace vmigrate::pager
