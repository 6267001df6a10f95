#include "memory/page_tags.hpp"

#include <algorithm>
#include <cstring>

#include "base/check.hpp"

namespace vmigrate::memory {
namespace {

static_assert(wire::kPageTagBytes == Gmac::kTagBytes);

/// Bytes that one read brings.
constexpr uint64_t kTagReadBytes = 64 << 10;

/// In the nonce of a chunk's digest, beside the region: no page has this bit.
constexpr uint32_t kOfChunk = uint32_t{1} << 31;

const Error kTagFailed{ErrorCode::kSystem, 0, "AES-GCM"};

std::array<uint8_t, Gmac::kNonceBytes> nonce_of(uint32_t region, uint64_t number) {
  std::array<uint8_t, Gmac::kNonceBytes> nonce;
  std::memcpy(nonce.data(), &region, sizeof region);
  std::memcpy(nonce.data() + sizeof region, &number, sizeof number);
  return nonce;
}

bool is_zeros(std::span<const std::byte> bytes) {
  return bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

Status finish(Gmac& gmac, std::byte* out) {
  uint8_t tag[Gmac::kTagBytes];
  if (!gmac.finish(tag)) return kTagFailed;
  std::memcpy(out, tag, sizeof tag);
  return ok();
}

}  // namespace

Result<std::unique_ptr<PageTagger>> PageTagger::create(const TagKey& key) {
  auto gmac = Gmac::create(key);
  if (!gmac) return gmac.error();
  return std::unique_ptr<PageTagger>(new PageTagger(std::move(gmac).value()));
}

PageTagger::PageTagger(std::unique_ptr<Gmac> gmac) : gmac_(std::move(gmac)), buffer_(kTagReadBytes) {}

Status PageTagger::tag(uint32_t region_index, uint64_t page_bytes, PageRun run, const ReadRegion& read,
                       std::span<std::byte> tags) {
  VMG_CHECK(tags.size() == run.count * wire::kPageTagBytes);
  if (page_bytes <= kTagReadBytes) return tag_small(region_index, page_bytes, run, read, tags.data());
  for (uint64_t i = 0; i < run.count; ++i) {
    const Status tagged = tag_large(region_index, page_bytes, PageIndex{raw(run.first) + i}, read,
                                    tags.data() + i * wire::kPageTagBytes);
    if (!tagged) return tagged;
  }
  return ok();
}

/// Several pages come with one read.
Status PageTagger::tag_small(uint32_t region_index, uint64_t page_bytes, PageRun run, const ReadRegion& read,
                             std::byte* tags) {
  const uint64_t at_once = kTagReadBytes / page_bytes;
  for (uint64_t done = 0; done < run.count; done += at_once) {
    const uint64_t count = std::min(at_once, run.count - done);
    const uint64_t first = raw(run.first) + done;
    const std::span<std::byte> pages(buffer_.data(), count * page_bytes);
    if (Status got = read(first * page_bytes, pages); !got) return got;
    for (uint64_t i = 0; i < count; ++i) {
      const auto page = pages.subspan(i * page_bytes, page_bytes);
      std::byte* tag = tags + (done + i) * wire::kPageTagBytes;
      if (is_zeros(page)) {
        std::memset(tag, 0, wire::kPageTagBytes);
        continue;
      }
      gmac_->begin(nonce_of(region_index, first + i));
      gmac_->add(page);
      if (Status tagged = finish(*gmac_, tag); !tagged) return tagged;
    }
  }
  return ok();
}

Status PageTagger::tag_large(uint32_t region_index, uint64_t page_bytes, PageIndex page,
                             const ReadRegion& read, std::byte* tag) {
  bool holds_data = false;
  gmac_->begin(nonce_of(region_index, raw(page)));
  for (uint64_t at = 0; at < page_bytes; at += kTagReadBytes) {
    if (Status got = read(raw(page) * page_bytes + at, buffer_); !got) return got;
    holds_data = holds_data || !is_zeros(buffer_);
    gmac_->add(buffer_);
  }
  if (Status tagged = finish(*gmac_, tag); !tagged) return tagged;
  if (!holds_data) std::memset(tag, 0, wire::kPageTagBytes);
  return ok();
}

Status PageTagger::digest(uint32_t region_index, uint64_t chunk, std::span<const std::byte> tags,
                          std::span<std::byte> digest) {
  VMG_CHECK(digest.size() == wire::kPageTagBytes);
  gmac_->begin(nonce_of(region_index | kOfChunk, chunk));
  gmac_->add(tags);
  return finish(*gmac_, digest.data());
}

Result<std::vector<std::byte>> digest_chunks(const ChunkRequest& request, uint64_t page_count,
                                             uint64_t page_bytes, const TagRun& tag_run) {
  const uint64_t chunks = chunks_in(page_count, page_bytes);
  const auto& [key, region_index, first_chunk, chunk_count] = request;
  if (chunk_count > wire::kMemoryChunksMax || first_chunk > chunks || chunk_count > chunks - first_chunk)
    return Error{ErrorCode::kInvalidArgument, 0, "chunks of a region"};
  auto tagger = PageTagger::create(key);
  if (!tagger) return tagger.error();
  const uint64_t per_chunk = pages_per_chunk(page_bytes);
  std::vector<std::byte> tags(per_chunk * wire::kPageTagBytes);
  std::vector<std::byte> digests(chunk_count * wire::kPageTagBytes);
  for (uint64_t i = 0; i < chunk_count; ++i) {
    const uint64_t first_page = (first_chunk + i) * per_chunk;
    const PageRun run{PageIndex{first_page}, std::min(per_chunk, page_count - first_page)};
    const auto its_tags = std::span(tags).first(run.count * wire::kPageTagBytes);
    if (Status tagged = tag_run(*tagger.value(), run, its_tags); !tagged) return tagged.error();
    const auto out = std::span(digests).subspan(i * wire::kPageTagBytes, wire::kPageTagBytes);
    const Status made = tagger.value()->digest(region_index, first_chunk + i, its_tags, out);
    if (!made) return made.error();
  }
  return digests;
}

}  // namespace vmigrate::memory
