#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "transport/proof.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Accepts connections and holds them until they have answered the challenge. A connection costs one slot of
/// a fixed table and no thread. If the table is full, one that has waited long is closed: an honest peer
/// answers at once, so a flood cannot keep it out, neither of silent peers nor of such as only say hello.
class HelloGate {
 public:
  /// Called on the accept thread. kOk: the owner took `socket` over and answers the hello.
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual wire::HelloStatus admit(const Transcript& transcript, std::span<const uint8_t> proof,
                                    UniqueFd& socket) = 0;
    virtual wire::HelloStatus admit_old(const wire::OldHello& hello, UniqueFd& socket) = 0;
  };

  HelloGate(UniqueFd listening, UniqueFd wake, bool tcp, Owner& owner);
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
    wire::Hello hello{};  ///< what comes
    bool is_challenged = false;
    Transcript transcript;  ///< once challenged
  };

  void accept_all();
  Pending* slot_for_another();
  void pause_accepting();
  void receive(Pending& pending);
  bool receive_hello(Pending& pending);
  void answer_first(Pending& pending);
  void hand_over(Pending& pending);
  void refuse(Pending& pending, wire::HelloStatus status);
  void reject(Pending& pending);
  void expire(Clock::time_point now);
  int wait_ms(Clock::time_point now) const;

  const UniqueFd listening_;
  const UniqueFd wake_;
  const bool tcp_;
  Owner& owner_;
  UniqueFd epoll_;
  bool accepting_ = true;
  Clock::time_point accept_again_;
  std::array<Pending, wire::kHelloPendingMax> pending_;
  std::atomic<uint64_t> rejected_hellos_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace vmigrate::transport
