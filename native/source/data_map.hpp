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
  /// Not ready: no bits set.
  static Result<std::unique_ptr<DataMap>> create(uint64_t page_count);
  ~DataMap();
  DataMap(const DataMap&) = delete;
  DataMap& operator=(const DataMap&) = delete;

  void set(PageRun run);
  /// The bits are final.
  void finish(uint64_t data_page_count);
  /// For ExposedSession::expose; its descriptor cannot be written through, whoever gets hold of it.
  transport::LocalMemory readable() const;
  /// The same for a provider whose `expose` wants a mapping that may be written through (fills_holes).
  transport::LocalMemory pinnable() const;

 private:
  DataMap() = default;
  UniqueFd read_fd_;
  std::byte* base_ = nullptr;
  /// What transports read through: a mapping of its own, so that nothing can write by it.
  std::byte* read_base_ = nullptr;
  uint64_t length_bytes_ = 0;
  uint64_t page_count_ = 0;
};

}  // namespace vmigrate::pager
