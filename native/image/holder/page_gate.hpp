#pragma once

#include <cstdint>
#include <memory>

#include "fetch/core.hpp"
#include "image/digests/digests.hpp"
#include "image/serve/core.hpp"
#include "memory/page_hasher.hpp"

namespace vmigrate::pager {

/// Pages that one lane has read become present here, unless their digests say that they are something else.
/// Such a page is absent again, before anybody has seen it. A page whose digest is not known yet passes; the
/// thread that brings the digest looks at it (F15, F16). One for each lane, for its thread.
class PageGate {
 public:
  /// `digests` may be nullptr: everything passes. `wakes`: the thread that serves the clones is another one,
  /// and is woken for those that wait.
  PageGate(ImageCore& core, FetchCore& fetch, const ImageDigests* digests, bool wakes)
      : core_(core), fetch_(fetch), digests_(digests), wakes_(wakes) {}
  Status open();

  /// Who has sent a page. Too many wrong pages of the root end the session; a near holder is given up
  /// instead.
  enum class Origin : uint8_t { kRoot = 1, kNear };
  /// The run's bytes are complete, and its pages claimed by the caller. Returns how many pages were refused.
  uint64_t publish(uint32_t region_index, PageRun run, Origin origin = Origin::kRoot);
  /// The caller gives its claims up, and nothing writes into the pages any more.
  void give_back(uint32_t region_index, PageRun run);
  /// The holder says that the page is a hole. False: its digest is known, and not that of zeros.
  bool may_be_zero(uint32_t region_index, PageIndex page) const;
  /// Pages of the run have been marked as zeros, each after may_be_zero. False: the digest of one came in
  /// between and says something else, and the session has failed.
  bool zeros_are_right(uint32_t region_index, PageRun run);

 private:
  void let_pass(uint32_t region_index, PageRun run, uint64_t unchecked_page);
  bool refuse(uint32_t region_index, PageIndex page, Origin origin);
  bool is_right_after_all(uint32_t region_index, PageRun run);

  ImageCore& core_;
  FetchCore& fetch_;
  const ImageDigests* const digests_;
  const bool wakes_;
  std::unique_ptr<memory::PageHasher> hasher_;  ///< with digests
};

}  // namespace vmigrate::pager
