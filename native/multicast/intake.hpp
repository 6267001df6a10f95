#pragma once

#include <cstdint>
#include <span>

#include "multicast/assembler.hpp"
#include "multicast/datagram/auth.hpp"
#include "multicast/datagram/header.hpp"
#include "multicast/datagram/sequence_window.hpp"
#include "multicast/receiver.hpp"

namespace vmigrate::multicast {

/// What a receiver makes of the datagrams that arrive, which may come from anybody: counts the sender's own,
/// each once, and puts their pages together. One thread.
class Intake {
 public:
  /// All arguments must outlive it.
  Intake(DatagramAuth& auth, uint64_t session, PageSink& sink)
      : auth_(auth), session_(session), assembler_(sink) {}

  /// False: the sender has not made it, and it changes nothing but a counter. True: he has, though it may be
  /// a repetition, or senseless.
  bool take(std::span<const std::byte> datagram);
  /// The sender has said that nothing more comes.
  bool has_end() const { return has_end_; }
  uint64_t highest_sequence() const { return window_.highest(); }
  /// Without the processor time.
  ReceiverCounters counters() const;

 private:
  void take_genuine(const DatagramHeader& header, std::span<const std::byte> datagram);

  DatagramAuth& auth_;
  const uint64_t session_;
  Assembler assembler_;
  SequenceWindow window_;
  ReceiverCounters counted_;
  bool has_end_ = false;
};

}  // namespace vmigrate::multicast
