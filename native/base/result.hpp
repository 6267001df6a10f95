#pragma once

#include <cerrno>
#include <optional>
#include <utility>
#include <variant>

#include "wire/wire_generated.hpp"

namespace vmigrate {

using ErrorCode = wire::NativeError;

/// An error, classified where it was first known. `what` is a string with static storage that names the
/// operation ("pwrite region"). `system_errno` is 0 if no system call failed. Cheap to copy: it allocates
/// nothing, so it may be made on the page path.
struct Error {
  ErrorCode code;
  int system_errno = 0;
  const char* what = "";
};

/// Turns an errno into the code that a caller acts on, and keeps the errno.
Error system_error(const char* what, int system_errno = errno);

/// A value or an Error. Callers must check it: there are no exceptions between modules.
template <typename T = std::monostate>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: conversion is the point
  Result(Error error) : state_(std::in_place_index<1>, error) {}         // NOLINT

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  const Error& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

using Status = Result<std::monostate>;
inline Status ok() {
  return std::monostate{};
}

}  // namespace vmigrate
