#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::memory {

using wire::PageState;

/// Every move a page may make (docs/PAGE_STATES.md). kClaimed -> kAbsent is only for a claim whose fetch is
/// over without bytes: unclaim, and reopen after the claiming process died.
constexpr bool transition_allowed(PageState from, PageState to) {
  switch (from) {
    case PageState::kAbsent:
      return to == PageState::kClaimed || to == PageState::kZero;
    case PageState::kClaimed:
      return to == PageState::kPresent || to == PageState::kAbsent;
    case PageState::kPresent:
    case PageState::kZero:
      return false;
  }
  return false;
}

/// The state of every page of one region on this host, a byte a page, in a file beside the region so that it
/// survives this process. docs/PAGE_STATES.md lists what each state allows and the ordering pairs.
/// Thread-safe.
class PresenceMap {
 public:
  /// New map: all pages kAbsent.
  static Result<std::unique_ptr<PresenceMap>> create(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes);
  /// Map left by an earlier process: kClaimed becomes kAbsent (its fetch died with that process). kCorrupt on
  /// any impossible header or state.
  static Result<std::unique_ptr<PresenceMap>> reopen(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes);
  ~PresenceMap();
  PresenceMap(const PresenceMap&) = delete;
  PresenceMap& operator=(const PresenceMap&) = delete;

  uint64_t page_count() const { return page_count_; }
  /// Acquire: kPresent seen here means the page's bytes are visible. Pairs with publish.
  PageState state(PageIndex page) const;
  /// kAbsent -> kClaimed, by exactly one caller. False: somebody else has it or it is there.
  bool claim(PageIndex page);
  /// Claims the longest run of absent pages starting at `first`, at most `count_max`.
  uint64_t claim_run(PageIndex first, uint64_t count_max);
  /// kClaimed -> kPresent, release: the page's bytes are complete before its state says so. CHECKs that the
  /// page was claimed.
  void publish(PageRun run);
  /// kAbsent -> kZero for a page known to be a hole at the source. False if it was not absent.
  bool mark_zero(PageIndex page);
  /// kClaimed -> kAbsent, only for a claim whose fetch is known to be over without bytes (the session was
  /// torn down before commit).
  void unclaim(PageRun run);
  /// First absent page at or after `from`; page_count() if none.
  PageIndex next_absent(PageIndex from) const;

 private:
  PresenceMap(UniqueFd fd, void* mapping, uint64_t page_count);
  UniqueFd fd_;
  void* mapping_;
  std::atomic<uint8_t>* states_;
  uint64_t page_count_;
};

}  // namespace vmigrate::memory
