#pragma once

#include <cstdint>

namespace vmigrate::pager {

/// In nanoseconds.
inline constexpr uint64_t kMs = 1'000'000;
inline constexpr uint64_t kMib = 1 << 20;

}  // namespace vmigrate::pager
