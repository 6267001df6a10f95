#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "fetch/endpoints.hpp"
#include "memory/page_tags.hpp"
#include "memory/region_config.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

enum class TargetState : uint32_t {
  kIdle = 1,      ///< opened; faults wait in the kernel
  kAhead,         ///< fetching while the VM runs on the source; faults wait in the kernel
  kFilling,       ///< serving faults and prefetching
  kDisconnected,  ///< connection lost: faults wait, claims are kept; connect() resumes
  kComplete,      ///< every page is here, ranges are unregistered, threads have ended
  kFailed,        ///< cannot resume by itself (no space, corrupt peer, VM gone); failure() says why. Faults
                  ///< wait.
  kClosed,
};

struct TargetOptions : FetchOptions {
  /// If not empty, each page is tagged under the key before the VM can see it, and the tags are kept in these
  /// files, one for each region.
  std::vector<std::string> tag_paths{};
  memory::TagKey tag_key{};
  /// An earlier process has fetched ahead. Then a page that is absent may have old bytes in the file, and no
  /// data map makes it zero: it is fetched, whatever it holds.
  bool has_fetched_ahead = false;
};

/// The target's side of one post-copy. It serves QEMU's faults first, then fetches the pages around them,
/// then sweeps the rest. It never fetches pages that are holes according to the source's data map. It owns
/// its threads: one for faults and demand, one for bulk. The threads end when the last page is here.
/// Thread-safe for its callers.
class TargetSession {
 public:
  /// Opens region and presence files, and those for tags. A file of tags that is lost is no reason to keep a
  /// VM from its memory: without it, nothing is tagged. With `resume` the session takes over the presence map
  /// of an earlier process: present pages stay present, and every waiter is woken once so that its fault is
  /// reported again. `memory` must outlive the session and be complete, and its ranges must be registered for
  /// missing and minor. A session thread calls `on_edge` when state() has changed; `on_edge` must not block
  /// and must not call back into the session.
  static Result<std::unique_ptr<TargetSession>> open(const VmMemory& memory,
                                                     std::span<const TargetRegionConfig> regions,
                                                     const TargetOptions& options, bool resume,
                                                     std::function<void()> on_edge);
  virtual ~TargetSession() = default;
  /// Gives the session its connections. Allowed from kIdle, kAhead or kDisconnected. Operations that were
  /// outstanding when the old connections broke are posted again.
  virtual Status connect(SourceEndpoints endpoints) = 0;
  /// Fetches every missing page while the VM still runs on the source. Nothing is mapped, so that pages may
  /// be taken back afterwards. Allowed from kIdle once connected. The state is kAhead, and kIdle when every
  /// page is here or hold_ahead() was called; after kDisconnected a connect() goes on. While it is under way,
  /// it takes a hold_ahead() back.
  virtual Status fetch_ahead() = 0;
  /// Lets fetch_ahead() end before every page is here: the state is kIdle when what was in flight has come.
  /// Does nothing in another state. After kDisconnected it takes effect with the next connection.
  virtual Status hold_ahead() = 0;
  /// Makes the pages absent again that the VM has written since they were fetched; the source has told the
  /// number of the round. Returns how many there were; 0 for those of a round that was taken already. Allowed
  /// from kIdle after fetch_ahead(). Blocks for a READ of the source's map.
  virtual Result<uint64_t> take_back(uint32_t round) = 0;
  /// Serves faults from now on, and prefetches as soon as the data map is ready. Allowed from kIdle once
  /// connected, or after serve_demand().
  virtual Status start() = 0;
  /// Serves faults from now on and fetches nothing else; start() adds the prefetch. Allowed from kIdle once
  /// connected. Meant for the downtime: the VM does not run yet, loading its device state may touch a few
  /// pages, and every cycle counts.
  virtual Status serve_demand() = 0;
  /// Ends the threads and waits for them. Pages that are not here yet stay absent or claimed in the presence
  /// file, and faults wait. Idempotent.
  virtual void close() = 0;
  virtual TargetState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual void counters(std::span<uint64_t, wire::kTargetCounterCount> out) const = 0;
};

}  // namespace vmigrate::pager
