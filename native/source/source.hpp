#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "transport/region_keys.hpp"
#include "transport/transport.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

struct SourceRegionConfig {
  std::string path;
  uint64_t length_bytes = 0;
  uint64_t page_bytes = 0;
};

/// The VM is a clone: the regions are files of its image, which it maps copy-on-write.
struct SourceCloneConfig {
  /// Valid as long as the session. nullptr: its process has ended.
  const VmMemory* memory = nullptr;
  /// Where its own pages are kept, one for each region.
  std::vector<std::string> own_paths;
  /// It stands still, and an earlier daemon may have kept its pages.
  bool resume = false;
};

/// The source's side of one post-copy: exposes the regions read-only, with a data map for each
/// (wire::DataMapHeader, then one bit a page). scan() is called when the VM has stopped: it looks through the
/// files for holes on a thread of its own and sets each map's `ready` last; the pages that a clone has
/// written are then copied to files, so that its process may end. Thread-safe. Destroying it closes the
/// session's connections first.
class SourceSession {
 public:
  static Result<std::unique_ptr<SourceSession>> open(transport::Listener& listener,
                                                     const transport::Credentials& credentials,
                                                     std::span<const SourceRegionConfig> regions,
                                                     const SourceCloneConfig* clone = nullptr);
  virtual ~SourceSession() = default;
  virtual std::span<const SourceRegionKeys> keys() const = 0;
  /// Idempotent. The VM must not run from here on until the session is closed.
  virtual Status scan() = 0;
  /// Fills `out` in the order of wire::SourceCounter.
  virtual void counters(std::span<uint64_t, wire::kSourceCounterCount> out) const = 0;
  /// First failure of the scan, if any; kProcessGone if a clone has ended before its pages were kept.
  virtual std::optional<Error> failure() const = 0;
};

}  // namespace vmigrate::pager
