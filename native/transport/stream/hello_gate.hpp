#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "wire/wire_generated.hpp"

namespace vmigrate::transport {

/// Accepts connections and holds them until they have sent a hello. A connection costs one slot of a fixed
/// table and no thread. If the table is full, the connection that has waited longest is closed: an honest
/// peer sends its hello at once, so a flood of silent peers cannot keep it out.
class HelloGate {
 public:
  /// Called with a hello of the right version. kOk: the handler took `socket` over and answers the hello.
  using Admit = wire::HelloStatus (*)(void* context, const wire::Hello& hello, UniqueFd& socket);

  HelloGate(UniqueFd listening, UniqueFd wake, bool tcp, Admit admit, void* context);
  Status open();
  /// Runs the accept thread; returns after stop().
  void run();
  void stop();
  uint64_t rejected_hellos() const { return rejected_hellos_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  struct Pending {
    UniqueFd fd;
    uint32_t generation = 0;  ///< identifies an event of an earlier connection in the slot
    uint32_t received_bytes = 0;
    Clock::time_point deadline;
    wire::Hello hello{};
  };

  void accept_all();
  void pause_accepting();
  void receive(Pending& pending);
  void reject(Pending& pending);
  void expire(Clock::time_point now);
  int wait_ms(Clock::time_point now) const;

  const UniqueFd listening_;
  const UniqueFd wake_;
  const bool tcp_;
  const Admit admit_;
  void* const context_;
  UniqueFd epoll_;
  bool accepting_ = true;
  Clock::time_point accept_again_;
  std::array<Pending, wire::kHelloPendingMax> pending_;
  std::atomic<uint64_t> rejected_hellos_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace vmigrate::transport
