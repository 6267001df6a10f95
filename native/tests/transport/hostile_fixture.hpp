#pragma once

// Shared by the tests of both hostile halves: raw frames made by hand, and a deadline for them.

#include <chrono>
#include <span>

#include "tests/transport/fixture.hpp"
#include "transport/hello.hpp"
#include "transport/socket.hpp"

namespace vmigrate::transport {

inline Deadline soon() {
  return std::chrono::steady_clock::now() + kPatience;
}

template <typename T>
bool send_raw(int fd, const T& value) {
  return send_exactly(fd, std::as_bytes(std::span(&value, 1)), soon()).ok();
}

template <typename T>
bool receive_raw(int fd, T* value) {
  return receive_exactly(fd, std::as_writable_bytes(std::span(value, 1)), soon()).ok();
}

}  // namespace vmigrate::transport
