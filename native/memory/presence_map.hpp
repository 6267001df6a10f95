#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::memory {

using wire::PageState;

/// All allowed changes of a page's state (docs/PAGE_STATES.md) but that of take_back, which comes before any
/// VM may see the pages. kClaimed -> kAbsent is allowed only for a claim whose fetch ended without bytes: by
/// unclaim, and by reopen after the claiming process died.
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

/// The state of every page of one region on this host, one byte per page. It is kept in a file beside the
/// region so that it survives this process. docs/PAGE_STATES.md lists what each state allows and the ordering
/// pairs. Thread-safe.
class PresenceMap {
 public:
  /// Creates a new map in which all pages are kAbsent.
  static Result<std::unique_ptr<PresenceMap>> create(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes);
  /// Opens the map of an earlier process. kClaimed becomes kAbsent, because its fetch died with that process.
  /// What it has stored may be from anybody: `wipe` is called before, and makes the pages holes, so that a
  /// page that turns out to be zero is. kCorrupt on any impossible header or state; the error of `wipe`.
  static Result<std::unique_ptr<PresenceMap>> reopen(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes,
                                                     const std::function<Status(PageRun)>& wipe);
  ~PresenceMap();
  PresenceMap(const PresenceMap&) = delete;
  PresenceMap& operator=(const PresenceMap&) = delete;

  uint64_t page_count() const { return page_count_; }
  /// The states as others may read them, one PAGE_STATE byte a page: in the file from
  /// wire::kPresenceHeaderBytes on, and mapped.
  int fd() const { return fd_.get(); }
  std::byte* bytes() const { return reinterpret_cast<std::byte*>(states_); }
  /// Acquire: kPresent seen here means the page's bytes are visible. Pairs with publish.
  PageState state(PageIndex page) const;
  /// kAbsent -> kClaimed, by exactly one caller. False if another caller has claimed the page or the page is
  /// already here.
  bool claim(PageIndex page);
  /// Claims the longest run of absent pages that starts at `first`, at most `count_max` pages.
  uint64_t claim_run(PageIndex first, uint64_t count_max);
  /// kClaimed -> kPresent, release: the page's bytes are complete before its state says so. CHECKs that the
  /// page was claimed.
  void publish(PageRun run);
  /// kAbsent -> kZero for a page that is known to be a hole at the source. False if the page was not absent.
  bool mark_zero(PageIndex page);
  /// kClaimed -> kAbsent, only for a claim whose fetch is known to have ended without bytes (the session was
  /// torn down before commit).
  void unclaim(PageRun run);
  struct TakenBack {
    uint64_t present_pages = 0;
    uint64_t zero_pages = 0;
  };
  /// kPresent, kZero -> kAbsent, for pages that were written at the source after they had been fetched. Only
  /// before a VM may see any page of the map, and while nobody else uses it. CHECKs that no page is claimed.
  TakenBack take_back(PageRun run);
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
