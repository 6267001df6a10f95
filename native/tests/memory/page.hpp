#pragma once

#include <cstdint>

namespace vmigrate::memory {

inline constexpr uint64_t kPage = 4096;

}  // namespace vmigrate::memory
