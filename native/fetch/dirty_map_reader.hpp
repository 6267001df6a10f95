#pragma once

#include <chrono>
#include <cstdint>

#include "fetch/core.hpp"

namespace vmigrate::pager {

/// Reads the source's maps of the pages that its VM has written since they were fetched, and makes those
/// pages absent again. `round` is the number that the source has told; another one in a map is kProtocol. No
/// page is claimed, nobody sees the pages yet, and nobody else uses the link, which must be connected. It
/// waits for at most `timeout`, and not on when the session must end (kClosed). Returns how many pages were
/// not absent. After an error some of the pages may have been taken back: another call for the same round
/// does the rest.
Result<uint64_t> take_back_written(FetchCore& core, Link& link, uint32_t round,
                                   std::chrono::milliseconds timeout);

}  // namespace vmigrate::pager
