#pragma once

#include <vector>

#include "base/check.hpp"
#include "transport/memory_access.hpp"

namespace vmigrate::transport {

/// What an endpoint's owner registered; a LocalId is an index.
class LocalMemories {
 public:
  Result<LocalId> add(const LocalMemory& memory) {
    auto access = MemoryAccess::describe(memory);
    if (!access) return access.error();
    memories_.push_back(access.value());
    return static_cast<LocalId>(memories_.size() - 1);
  }
  const MemoryAccess& at(LocalId id) const {
    VMG_CHECK(static_cast<size_t>(id) < memories_.size());
    return memories_[static_cast<size_t>(id)];
  }
  /// The owner's operations are ours to trust, so a wrong one is a bug of ours. An empty one is not: the peer
  /// refuses it.
  void check(const Operation& operation) const {
    const MemoryAccess& memory = at(operation.local);
    VMG_CHECK(operation.length_bytes <= wire::kTransferBytesMax);
    VMG_CHECK(operation.length_bytes == 0 ||
              memory.contains(operation.local_offset_bytes, operation.length_bytes));
  }

 private:
  std::vector<MemoryAccess> memories_;
};

}  // namespace vmigrate::transport
