#pragma once

#include <array>
#include <cstdint>

#include "target/core.hpp"
#include "target/data_map_reader.hpp"
#include "target/fetch_table.hpp"
#include "target/prefetch.hpp"
#include "target/publish.hpp"

namespace vmigrate::pager {

/// The thread that reads from the source which pages are holes, and fetches the other pages before a vCPU
/// asks for them. run() is the thread's whole life; it ends when every page is here.
class BulkThread {
 public:
  explicit BulkThread(TargetCore& core);
  void run();

 private:
  bool take_new_link();
  bool connected() const;
  bool poll_completions();
  bool fetch(uint64_t at_ns);
  void pace(uint64_t at_ns, uint64_t bytes);
  void drop_connection();
  void sleep(uint64_t at_ns);

  TargetCore& core_;
  Publisher publisher_;
  FetchTable fetches_;
  DataMapReader maps_;
  ServiceRate rate_;
  Prefetch prefetch_;
  Link link_;
  bool link_dropped_ = false;
  uint64_t next_fetch_ns_ = 0;  ///< earliest time of the next fetch, for the bandwidth limit
};

}  // namespace vmigrate::pager
