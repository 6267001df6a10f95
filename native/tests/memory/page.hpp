#pragma once

#include <cstdint>

namespace vmigrate::memory {

inline constexpr uint64_t kPage = 4096;
inline constexpr uint64_t kLargePage = 2 << 20;

}  // namespace vmigrate::memory
