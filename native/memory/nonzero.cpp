// Finds the pages that hold data, for files whose holes show nothing.

#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "memory/region.hpp"
#include "memory/shrink_guard.hpp"

namespace vmigrate::memory {
namespace {

constexpr uint64_t kWordsAtOnce = 64;

/// Copying by system calls would cost more than the comparison.
bool all_zero(const std::byte* page, uint64_t length_bytes) {
  for (uint64_t at = 0; at < length_bytes; at += kWordsAtOnce * sizeof(uint64_t)) {
    uint64_t words[kWordsAtOnce];
    std::memcpy(words, page + at, sizeof words);
    uint64_t any = 0;
    for (const uint64_t word : words) any |= word;
    if (any != 0) return false;
  }
  return true;
}

struct Look {
  const std::byte* base;
  uint64_t page_bytes;
  uint64_t page_count;
  uint64_t nonzero_bits;  ///< one per page
};

void look(void* context) {
  Look& what = *static_cast<Look*>(context);
  for (uint64_t i = 0; i < what.page_count; ++i) {
    if (!all_zero(what.base + i * what.page_bytes, what.page_bytes)) what.nonzero_bits |= uint64_t{1} << i;
  }
}

}  // namespace

Status Region::each_nonzero_run(PageRun within, const std::function<void(PageRun)>& visit) const {
  VMG_CHECK(raw(within.first) <= page_count() && within.count <= page_count() - raw(within.first));
  const uint64_t end_page = raw(within.first) + within.count;
  PageRun run{within.first, 0};
  const auto end_run = [&] {
    if (run.count != 0) visit(run);
    run.count = 0;
  };
  for (uint64_t page = raw(within.first); page < end_page;) {
    Look what{base_ + page * page_bytes_, page_bytes_, std::min<uint64_t>(64, end_page - page), 0};
    if (!touch_guarded(look, &what))
      return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
    for (uint64_t i = 0; i < what.page_count; ++i) {
      if ((what.nonzero_bits >> i & 1) == 0) {
        end_run();
        continue;
      }
      if (run.count == 0) run.first = PageIndex{page + i};
      ++run.count;
    }
    page += what.page_count;
  }
  end_run();
  return ok();
}

}  // namespace vmigrate::memory
