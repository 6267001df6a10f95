#pragma once

#include <vector>

#include "base/check.hpp"
#include "transport/memory_access.hpp"

namespace vmigrate::transport {

/// The memories that an endpoint's owner registered. A LocalId is an index.
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
  /// The owner's operations are trusted, so an invalid one is a bug of ours. An empty operation is not a bug:
  /// the peer refuses it.
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
