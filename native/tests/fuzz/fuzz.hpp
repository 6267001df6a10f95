#pragma once

#include <sys/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/check.hpp"

// What the fuzz targets share. A target is one file *_fuzz.cpp with LLVMFuzzerTestOneInput and seeds(). A
// property that does not hold ends the process by VMG_CHECK, as a fault that a sanitizer finds does.

namespace vmigrate::fuzz {

/// Takes an input apart from its front. What the input lacks is zero, so that every input means something.
class Input {
 public:
  Input(const uint8_t* bytes, size_t length_bytes)
      : rest_(reinterpret_cast<const std::byte*>(bytes), length_bytes) {}

  bool empty() const { return rest_.empty(); }
  template <typename T>
  T take() {
    T value{};
    const auto part = bytes(sizeof value);
    std::memcpy(&value, part.data(), part.size());
    return value;
  }
  std::span<const std::byte> bytes(size_t count_max) {
    const auto part = rest_.first(std::min(count_max, rest_.size()));
    rest_ = rest_.subspan(part.size());
    return part;
  }
  std::span<const std::byte> rest() { return bytes(rest_.size()); }

 private:
  std::span<const std::byte> rest_;
};

/// An input that is put together from values, as Input takes it apart.
class Seed {
 public:
  template <typename T>
  Seed& add(const T& value) {
    return bytes(std::as_bytes(std::span(&value, 1)));
  }
  Seed& bytes(std::span<const std::byte> part) {
    bytes_.insert(bytes_.end(), part.begin(), part.end());
    return *this;
  }
  Seed& fill(size_t count, uint8_t value) {
    bytes_.insert(bytes_.end(), count, std::byte{value});
    return *this;
  }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Faster than the comparison of containers of std::byte.
inline bool same(std::span<const std::byte> left, std::span<const std::byte> right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size()) == 0);
}

/// Waits for all of `out`, or for a whole record. libFuzzer's clock interrupts system calls. Returns what
/// recv() does.
ssize_t receive(int socket, std::span<std::byte> out, int flags);

/// Sends with SCM_RIGHTS, at most kDescriptorsMax of them. Returns what sendmsg() does.
inline constexpr size_t kDescriptorsMax = 4;
ssize_t send_with(int socket, std::span<const std::byte> bytes, std::span<const int> descriptors);

/// Defined by each target: inputs as honest peers make them, and some that are nearly so. The corpus has
/// grown from these.
std::vector<Seed> seeds();

}  // namespace vmigrate::fuzz
