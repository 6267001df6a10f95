#pragma once

#include <functional>
#include <optional>

#include "base/result.hpp"
#include "base/types.hpp"
#include "memory/digest_map.hpp"
#include "memory/fill_state.hpp"

namespace vmigrate::pager {

/// Looks whether the pages of the run that are here are what their digests say, which must be known. Returns
/// the first that is not; kClosed if `must_stop` says so. A page that is not here yet is left to the thread
/// that publishes it (F15, F16).
Result<std::optional<PageIndex>> first_damaged(const FilledRegion& region, const memory::DigestMap& digests,
                                               PageRun run, const std::function<bool()>& must_stop);

}  // namespace vmigrate::pager
