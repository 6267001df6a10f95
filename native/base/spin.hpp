#pragma once

#include <thread>

namespace vmigrate {

/// Busy polling saves a wake-up where a processor is idle anyway, and takes one from the guest where it is
/// not: a vCPU, the thread that fetches for it and the one that serves it should fit side by side with one to
/// spare. On two processors, 512 MiB guest under random faults over tcp, spinning made no page come sooner
/// (p50 39 us either way).
inline bool may_spin() {
  static const bool has_spare_processor = std::thread::hardware_concurrency() >= 4;
  return has_spare_processor;
}

}  // namespace vmigrate
