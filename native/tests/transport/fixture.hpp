#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "base/unique_fd.hpp"
#include "transport/registry/registry.hpp"
#include "transport/testing/faulty.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

inline constexpr std::chrono::milliseconds kConnectTimeout{20'000};
inline constexpr std::chrono::seconds kPatience{20};

/// A mapped memfd, or a mapped file at a path.
class TestMemory {
 public:
  explicit TestMemory(uint64_t length_bytes, const std::string& path = {}, unsigned memfd_flags = 0);
  ~TestMemory();
  TestMemory(const TestMemory&) = delete;
  TestMemory& operator=(const TestMemory&) = delete;

  /// Every 8 bytes encode their position and the seed.
  void fill(uint64_t seed);
  LocalMemory local() const { return LocalMemory{base_, fd_.get(), 0, length_bytes_}; }
  std::byte* base() const { return base_; }
  int fd() const { return fd_.get(); }
  uint64_t length_bytes() const { return length_bytes_; }

 private:
  UniqueFd fd_;
  std::byte* base_ = nullptr;
  uint64_t length_bytes_;
};

/// gtest names a case by this.
inline void PrintTo(const Provider* provider, std::ostream* out) {
  *out << provider->name;
}

/// The providers of the registry, and one that only the tests know (unix_provider.hpp).
std::span<const Provider* const> tested_providers();
/// Why tests of this provider cannot run here; empty: they can run. CI accepts `needs CAPABILITY` if that
/// capability is missing.
std::string missing_for(const Provider& provider);

Credentials make_credentials(uint8_t seed, Security security = Security::kNone);
/// A fresh address to listen on.
Address listen_address(const Provider& provider);
Result<std::unique_ptr<Listener>> listen_at(const Provider& provider, const Address& address);
std::unique_ptr<Listener> must_listen(const Provider& provider);
Result<std::unique_ptr<Endpoint>> connect(const Provider& provider, const Address& address,
                                          const Credentials& credentials, Channel channel = Channel::kDemand);

/// Posts all operations, even if the endpoint would block in between, and returns the completions in the
/// order in which they came. Waits on event_fd only, so a missed readiness is a failure (after kPatience).
/// Stops early when the endpoint disconnects; everything that was posted is then completed.
std::vector<Completion> run_all(Endpoint& endpoint, std::span<const Operation> operations,
                                bool write = false);
OpResult run_one(Endpoint& endpoint, const Operation& operation, bool write = false);

/// Waits until event_fd is readable.
bool wait_ready(const Endpoint& endpoint, std::chrono::milliseconds timeout);
/// Polls the endpoint until it reports that it is disconnected.
bool wait_disconnected(Endpoint& endpoint);
/// Sends the message and retries as often as it would block.
bool send_message(Endpoint& endpoint, std::span<const std::byte> message);
std::vector<std::byte> receive_message(Endpoint& endpoint);

size_t count_entries(const char* directory);
/// True as soon as `condition` holds.
template <typename Condition>
bool eventually(Condition condition, std::chrono::milliseconds patience = kPatience);

template <typename Condition>
bool eventually(Condition condition, std::chrono::milliseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    ::usleep(1000);
  }
  return true;
}

}  // namespace vmigrate::transport
