#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "memory/page_tags.hpp"
#include "source/dirty_maps.hpp"
#include "source/region_reader.hpp"
#include "transport/region_keys.hpp"
#include "transport/transport.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

struct SourceRegionConfig {
  std::string path;
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
  /// Replaces the content of the file, whose length the region still has. Must outlive the session. Only for
  /// listeners whose provider serves by thread.
  const RegionReader* reader = nullptr;
};

/// The VM is a clone: its regions are the files of its image, mapped copy-on-write.
struct SourceCloneConfig {
  /// Must outlive the session. nullptr: the clone's process has ended.
  const VmMemory* memory = nullptr;
  /// Paths of the files that keep the clone's own pages, one per region.
  std::vector<std::string> own_paths;
  /// The clone is stopped, and an earlier daemon may have kept its pages already.
  bool resume = false;
};

/// The source's side of one post-copy. It exposes the regions read-only, with a data map for each
/// (wire::DataMapHeader, then one bit a page). Call scan() when the VM has stopped: a thread of its own
/// searches the files for holes and sets each map's `ready` last. If the VM is a clone, that thread then
/// copies the pages the clone has written to files, so that the clone's process may end. If the writes of the
/// VM are tracked, it runs on: the scan begins at once, and note_dirty() says afterwards what it has missed.
/// Thread-safe. The destructor closes the session's connections first.
class SourceSession {
 public:
  /// `tracked`: the VM runs, and the target fetches from it ahead of the switchover. Must outlive the
  /// session; not together with `clone` or a region's `reader`.
  static Result<std::unique_ptr<SourceSession>> open(transport::Listener& listener,
                                                     const transport::Credentials& credentials,
                                                     std::span<const SourceRegionConfig> regions,
                                                     const SourceCloneConfig* clone = nullptr,
                                                     const VmMemory* tracked = nullptr);
  virtual ~SourceSession() = default;
  virtual std::span<const SourceRegionKeys> keys() const = 0;
  /// Idempotent. The VM must not run from this call until the session is closed.
  virtual Status scan() = 0;
  /// See DirtyMaps::note. kInvalidArgument if writes are not tracked.
  virtual Result<DirtyMaps::Round> note_dirty(bool is_last) = 0;
  /// See DirtyMaps.
  virtual Result<bool> has_changed_since_last() = 0;
  /// The digests of chunks of a region, whose content must be final: the VM has stopped. It takes as long as
  /// reading them does. Any thread, while the session lives.
  virtual Result<std::vector<std::byte>> digest_chunks(const memory::ChunkRequest& request) const = 0;
  /// Fills `out` in the order of wire::SourceCounter.
  virtual void counters(std::span<uint64_t, wire::kSourceCounterCount> out) const = 0;
  /// First failure of the scan, if any. kProcessGone if a clone's process ended before its pages were kept.
  virtual std::optional<Error> failure() const = 0;
};

}  // namespace vmigrate::pager
