#include "transport/credentials.hpp"

#include <sys/random.h>

#include <cerrno>
#include <cstddef>

#include "base/check.hpp"

namespace vmigrate::transport {

bool equal_constant_time(std::span<const uint8_t> left, std::span<const uint8_t> right) {
  if (left.size() != right.size()) return false;
  uint8_t difference = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    difference = static_cast<uint8_t>(difference | (left[i] ^ right[i]));
    // Without this the compiler may leave the loop as soon as the outcome is known.
    asm volatile("" : "+r"(difference));
  }
  return difference == 0;
}

uint64_t random_key() {
  uint64_t key = 0;
  while (key == 0) {
    const ssize_t count = ::getrandom(&key, sizeof key, 0);
    if (count < 0 && errno == EINTR) continue;
    // getrandom returns up to 256 bytes whole once the generator is seeded. A kernel without getrandom is not
    // supported.
    VMG_CHECK(count == static_cast<ssize_t>(sizeof key));
  }
  return key;
}

}  // namespace vmigrate::transport
