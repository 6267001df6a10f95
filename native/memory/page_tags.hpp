#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/gmac.hpp"
#include "base/result.hpp"
#include "base/types.hpp"

namespace vmigrate::memory {

/// The secret under which the two hosts of one move compare its memory.
using TagKey = std::array<uint8_t, 32>;

/// Bytes of a region into `out`. Off the path of any signal: by system calls.
using ReadRegion = std::function<Status(uint64_t offset_bytes, std::span<std::byte> out)>;

/// Pages of a chunk (wire::kMemoryChunkBytes), at least one. The last chunk of a region may have fewer.
constexpr uint64_t pages_per_chunk(uint64_t page_bytes) {
  return page_bytes < wire::kMemoryChunkBytes ? wire::kMemoryChunkBytes / page_bytes : 1;
}
constexpr uint64_t chunks_in(uint64_t page_count, uint64_t page_bytes) {
  const uint64_t per_chunk = pages_per_chunk(page_bytes);
  return page_count / per_chunk + (page_count % per_chunk != 0 ? 1 : 0);
}

/// Computes the tags of pages: an AES-256-GMAC of each page whose nonce is its place. So a tag says what a
/// page holds, and that it belongs there. A page of zeros has a tag of zeros, so that holes need no work.
///
/// Tags never leave their host, and a digest of a chunk goes only to the other host of the move, over TLS.
/// That is why one place may be tagged again under the same key: an attacker sees no tag.
/// One thread. It allocates when it is created, and not for each page.
class PageTagger {
 public:
  static Result<std::unique_ptr<PageTagger>> create(const TagKey& key);

  /// Writes the tags of the run to `tags`, wire::kPageTagBytes for each page.
  Status tag(uint32_t region_index, uint64_t page_bytes, PageRun run, const ReadRegion& read,
             std::span<std::byte> tags);
  /// Writes the digest of a chunk to `digest`. `tags` are those of its pages.
  Status digest(uint32_t region_index, uint64_t chunk, std::span<const std::byte> tags,
                std::span<std::byte> digest);

 private:
  explicit PageTagger(std::unique_ptr<Gmac> gmac);
  Status tag_small(uint32_t region_index, uint64_t page_bytes, PageRun run, const ReadRegion& read,
                   std::byte* tags);
  Status tag_large(uint32_t region_index, uint64_t page_bytes, PageIndex page, const ReadRegion& read,
                   std::byte* tag);

  std::unique_ptr<Gmac> gmac_;
  std::vector<std::byte> buffer_;
};

/// What one call compares.
struct ChunkRequest {
  TagKey key{};
  uint32_t region_index = 0;
  uint64_t first_chunk = 0;
  uint64_t chunk_count = 0;
};

/// Writes the tags of a run of pages.
using TagRun = std::function<Status(PageTagger& tagger, PageRun run, std::span<std::byte> tags)>;

/// The digests of the chunks, wire::kPageTagBytes for each. `tag_run` is called once for each chunk, in
/// order. kInvalidArgument if the region has fewer chunks, or too many are asked for.
Result<std::vector<std::byte>> digest_chunks(const ChunkRequest& request, uint64_t page_count,
                                             uint64_t page_bytes, const TagRun& tag_run);

}  // namespace vmigrate::memory
