#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

struct evp_md_ctx_st;

namespace vmigrate::memory {

/// The first bytes of the SHA-256 of a page.
using Digest = std::array<std::byte, wire::kDigestBytes>;

/// Digest of a page of zeros; nullopt if regions cannot have this page size.
std::optional<Digest> digest_of_zeros(uint64_t page_bytes);

/// Computes the digests of a run of pages of a file, one after another. It reads with system calls: holes
/// stay holes and are not hashed, and a file that shrinks meanwhile raises no signal. One a thread: it
/// allocates when it is created, and not for each page.
class PageHasher {
 public:
  /// kUnsupported if the library has no SHA-256.
  static Result<std::unique_ptr<PageHasher>> create();
  ~PageHasher();
  PageHasher(const PageHasher&) = delete;
  PageHasher& operator=(const PageHasher&) = delete;

  /// From here on next() returns the digests of this run. The file must stay open, and the page size be
  /// possible.
  void begin(int fd, uint64_t page_bytes, PageRun run);
  /// The digest of the next page of the run. kRegionChanged if the file has become shorter.
  Result<Digest> next();

 private:
  explicit PageHasher(evp_md_ctx_st* context);
  Status find_data();
  Status read_at(uint64_t at_bytes, uint64_t length_bytes);
  Status update(const std::byte* bytes, size_t length_bytes);
  Result<Digest> hash_small();
  Result<Digest> hash_large();
  Result<Digest> finish();

  evp_md_ctx_st* const context_;
  std::vector<std::byte> buffer_;
  int fd_ = -1;
  uint64_t page_bytes_ = 0;
  Digest zeros_{};
  uint64_t at_bytes_ = 0;    ///< begin of the next page
  uint64_t end_bytes_ = 0;   ///< end of the run
  uint64_t data_bytes_ = 0;  ///< between at_bytes_ and here the file is known to have a hole
  uint64_t read_from_bytes_ = 0, read_to_bytes_ = 0;  ///< what buffer_ has
};

}  // namespace vmigrate::memory
