#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fetch/near/holders.hpp"
#include "fetch/near/reader.hpp"
#include "fetch/near/sink.hpp"
#include "fetch/transfer_size.hpp"

namespace vmigrate::pager {

/// The thread that fetches from near holders the pages that nobody waits for. It reads from all holders of
/// the nearest level that has a connected one, each from another place on, and waits for a multicast. run()
/// is the thread's whole life; it ends when every page is here.
class NearBulkThread {
 public:
  NearBulkThread(FetchCore& core, NearHolders& holders, NearSink& sink);
  void run();

 private:
  bool take_changes();
  bool drop_readers();
  bool poll();
  bool fetch(uint64_t at_ns);
  void follow_faults();
  bool update_feed(uint64_t at_ns);
  void note_worth(uint64_t bytes);
  bool may_fetch() const;
  bool is_active(NearReader& reader) const { return reader.holder().level == level_; }
  uint64_t bytes_in_flight() const;
  void sleep(uint64_t at_ns);

  FetchCore& core_;
  NearHolders& holders_;
  NearSink& sink_;
  ServiceRate rate_;
  TransferSize size_;
  std::vector<std::unique_ptr<NearReader>> readers_;
  uint32_t level_ = 0;  ///< the nearest of those of the readers
  uint64_t epoch_ = 0;
  uint64_t unclaimed_count_ = 0;
  uint32_t maps_known_ = 0;
  size_t taken_count_ = 0;     ///< holders for which NearHolders::add has opened the feed
  uint64_t salt_;              ///< where passes begin: another place on each host
  uint64_t worth_bytes_ = 0;   ///< have come since the root's sweep was held back last
  bool is_open_ = false;       ///< the feed
  bool is_held_back_ = false;  ///< by a multicast
};

}  // namespace vmigrate::pager
