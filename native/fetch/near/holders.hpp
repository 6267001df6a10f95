#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "fetch/core.hpp"
#include "fetch/near/limits.hpp"

namespace vmigrate::pager {

struct NearSnapshot {
  uint32_t id = 0;
  uint32_t level = 0;
  bool is_connected = false;
  uint64_t bytes = 0;            ///< of pages that it has brought
  std::optional<Error> failure;  ///< why it is not connected; kTimeout: it was silent
};

/// One near holder, as long as one of its connections or its record exists. Thread-safe.
class NearHolder {
 public:
  NearHolder(uint32_t its_id, uint32_t its_level) : id(its_id), level(its_level) {}

  const uint32_t id;
  const uint32_t level;  ///< 0 is nearest
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint64_t> refused_pages{0};
  /// Neither lane may ask it any more. Relaxed: a hint, followed by a wake.
  bool is_lost() const { return is_lost_.load(std::memory_order_relaxed); }

 private:
  friend class NearHolders;
  std::atomic<bool> is_lost_{false};
  std::optional<Error> failure_;  // with the mutex of NearHolders
};

/// One lane's connection to a near holder. The lane's thread owns it once it has taken it.
struct NearLink {
  std::shared_ptr<NearHolder> holder;
  /// States that are read over the connection; registered as Link::map_buffer. Before the endpoint, which
  /// writes into it.
  std::vector<std::byte> states;
  Link link;
};

/// The hosts that hold a part of the image and are asked before the root: which there are, and their
/// connections on the way to the two threads that use them (demand.hpp, bulk.hpp). Any thread, unless stated
/// otherwise.
class NearHolders {
 public:
  explicit NearHolders(FetchCore& core) : core_(core) {}

  /// Gives both lanes a connection. `keys` must have `presence`. A lost holder of the same id is replaced.
  /// kAlreadyExists: one is connected. kInvalidArgument: too many. kClosed: the session has ended. Once every
  /// page is here it does nothing.
  Status add(SourceEndpoints endpoints, uint32_t id, uint32_t level);
  /// Forgets the holder. Its connections end, and what they were to bring is fetched elsewhere.
  void remove(uint32_t id);
  std::vector<NearSnapshot> snapshot() const;
  /// Neither lane asks it any more. The first reason counts.
  void drop(NearHolder& holder, const Error& error);
  /// The session has ended: refuses others.
  void end();

  /// Changes with each holder that comes or goes: then a lane calls take, and looks at is_lost of those it
  /// has.
  uint64_t epoch() const {
    // A23 pairs with R23 in changed: the links before their number.
    return epoch_.load(std::memory_order_acquire);
  }
  /// The connections that the lane has not taken yet, to the lane's thread.
  std::vector<NearLink> take(Lane lane);

 private:
  void changed();
  std::shared_ptr<NearHolder> find(uint32_t id) const;  ///< with mutex_
  Status check_may_add(uint32_t id) const;              ///< with mutex_

  FetchCore& core_;
  mutable std::mutex mutex_;  // guards all below
  std::vector<std::shared_ptr<NearHolder>> holders_;
  std::vector<NearLink> pending_demand_, pending_bulk_;
  bool is_ended_ = false;
  std::atomic<uint64_t> epoch_{0};
};

}  // namespace vmigrate::pager
