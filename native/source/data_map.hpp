#pragma once

#include <cstdint>
#include <memory>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// The source's map of one region: wire::DataMapHeader, then one bit a page, in anonymous memory that peers
/// may read. One thread writes (set, then finish); transports read at any time.
class DataMap {
 public:
  /// Which pages hold data, once; or which were written, again after each round.
  enum class Kind : uint8_t { kData = 1, kDirty };
  /// Creates a map that is not ready and has no bits set.
  static Result<std::unique_ptr<DataMap>> create(uint64_t page_count, Kind kind = Kind::kData);
  ~DataMap();
  DataMap(const DataMap&) = delete;
  DataMap& operator=(const DataMap&) = delete;

  /// Makes the map not ready, and takes all bits away. Nobody may be reading them.
  void begin();
  void set(PageRun run);
  /// All bits of the run are set.
  bool has_all(PageRun run) const;
  /// The number of bits that are set.
  uint64_t count() const;
  /// A bit for each page. Valid until the next begin() or set().
  std::span<const std::byte> bits() const;
  /// Declares the bits final, for a map of written pages until the next begin(). `ready` is what readers see:
  /// the number of the round.
  void finish(uint64_t page_count, uint32_t ready = 1);
  /// For ExposedSession::expose. Its descriptor cannot be written through by any process that gets it.
  transport::LocalMemory readable() const;
  /// The same for a provider whose `expose` needs a writable mapping (fills_holes).
  transport::LocalMemory pinnable() const;

 private:
  DataMap() = default;
  UniqueFd read_fd_;
  std::byte* base_ = nullptr;
  /// A separate read-only mapping for the transports, so that nothing can write through it.
  std::byte* read_base_ = nullptr;
  uint64_t length_bytes_ = 0;
  uint64_t page_count_ = 0;
};

}  // namespace vmigrate::pager
