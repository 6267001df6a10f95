#pragma once

#include <cstdint>

#include "base/result.hpp"

namespace vmigrate {

/// The set of descriptors that one thread sleeps on. That thread calls it, or another before it runs.
class Watcher {
 public:
  virtual ~Watcher() = default;
  /// While the descriptor is readable the thread does not sleep. `tag` tells its owner which one is readable.
  virtual Status watch(int fd, uint32_t tag) = 0;
  virtual void unwatch(int fd) = 0;
};

}  // namespace vmigrate
