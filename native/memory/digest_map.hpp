#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "memory/page_hasher.hpp"

namespace vmigrate::memory {

/// The digests of the pages of one region, in a file of their own, so that they survive this process. They
/// become known from the first page on. One thread at a time may append; everything else is thread-safe.
class DigestMap {
 public:
  /// Takes over an intact file of the same geometry, with what is known in it, and replaces any other file.
  static Result<std::unique_ptr<DigestMap>> open_or_create(const std::string& path, uint64_t page_count,
                                                           uint64_t page_bytes);
  ~DigestMap();
  DigestMap(const DigestMap&) = delete;
  DigestMap& operator=(const DigestMap&) = delete;

  uint64_t page_count() const { return page_count_; }
  /// Acquire: the digests of the pages below are visible. Pairs with append.
  uint64_t known() const;
  /// Of pages below known().
  Digest digest(PageIndex page) const;
  std::span<const std::byte> digests(PageRun run) const;
  /// Digests of the pages that follow known(), for which there must be room. A thread that appends and then
  /// looks at the state of a page, and one that changes the state and then looks at known(), do not miss each
  /// other (F16).
  void append(std::span<const std::byte> digests);

 private:
  DigestMap(UniqueFd fd, void* mapping, uint64_t page_count);
  static Result<std::unique_ptr<DigestMap>> take_over(const std::string& path, uint64_t page_count,
                                                      uint64_t page_bytes);
  static Result<std::unique_ptr<DigestMap>> create(const std::string& path, uint64_t page_count,
                                                   uint64_t page_bytes);
  UniqueFd fd_;
  std::byte* mapping_;
  std::atomic<uint64_t>& known_;
  uint64_t page_count_;
};

}  // namespace vmigrate::memory
