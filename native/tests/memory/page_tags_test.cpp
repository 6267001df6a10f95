#include "memory/page_tags.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "base/unique_fd.hpp"
#include "memory/tag_file.hpp"
#include "tests/memory/page.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::memory {
namespace {

constexpr uint64_t kTag = wire::kPageTagBytes;

using Bytes = std::vector<std::byte>;

Bytes random_bytes(uint64_t count) {
  std::minstd_rand random;
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() >> 8);
  return bytes;
}

TagKey key_of(uint8_t first) {
  TagKey key{};
  key[0] = first;
  return key;
}

Bytes tags_of(const Bytes& content, uint64_t page_bytes, PageRun run, const TagKey& key = key_of(1),
              uint32_t region = 0) {
  auto tagger = PageTagger::create(key);
  EXPECT_TRUE(tagger.ok());
  Bytes tags(run.count * kTag);
  const auto read = [&](uint64_t at, std::span<std::byte> out) {
    std::copy_n(content.begin() + static_cast<ptrdiff_t>(at), out.size(), out.begin());
    return ok();
  };
  EXPECT_TRUE(tagger.value()->tag(region, page_bytes, run, read, tags).ok());
  return tags;
}

Bytes tag_of(const Bytes& content, uint64_t page) {
  return tags_of(content, kPage, {PageIndex{page}, 1});
}

TEST(PageTags, APageOfZerosHasATagOfZeros) {
  Bytes content(40 * kPage);
  content[3 * kPage + 4095] = std::byte{1};
  const Bytes tags = tags_of(content, kPage, {PageIndex{0}, 40});
  for (uint64_t page = 0; page < 40; ++page) {
    const Bytes tag(tags.begin() + page * kTag, tags.begin() + (page + 1) * kTag);
    EXPECT_EQ(tag == Bytes(kTag), page != 3) << page;
  }
  Bytes large(2 * kLargePage);
  large.back() = std::byte{1};
  const Bytes of_large = tags_of(large, kLargePage, {PageIndex{0}, 2});
  EXPECT_TRUE(
      std::all_of(of_large.begin(), of_large.begin() + kTag, [](auto b) { return b == std::byte{}; }));
  EXPECT_FALSE(std::all_of(of_large.begin() + kTag, of_large.end(), [](auto b) { return b == std::byte{}; }));
}

TEST(PageTags, OneFlippedBitAnywhereChangesTheTag) {
  Bytes content = random_bytes(kPage);
  const Bytes right = tag_of(content, 0);
  for (uint64_t bit = 0; bit < kPage * 8; bit += 7) {
    content[bit / 8] ^= std::byte{1} << bit % 8;
    ASSERT_NE(tag_of(content, 0), right) << bit;
    content[bit / 8] ^= std::byte{1} << bit % 8;
  }
  EXPECT_EQ(tag_of(content, 0), right);
  Bytes large = random_bytes(kLargePage);
  const Bytes right_large = tags_of(large, kLargePage, {PageIndex{0}, 1});
  large[kLargePage - 1] ^= std::byte{1};
  EXPECT_NE(tags_of(large, kLargePage, {PageIndex{0}, 1}), right_large);
}

TEST(PageTags, TheSameBytesElsewhereOrUnderAnotherKeyHaveAnotherTag) {
  Bytes content = random_bytes(kPage);
  content.insert(content.end(), content.begin(), content.begin() + kPage);
  const Bytes here = tag_of(content, 0);
  EXPECT_NE(tag_of(content, 1), here);
  EXPECT_NE(tags_of(content, kPage, {PageIndex{0}, 1}, key_of(2)), here);
  EXPECT_NE(tags_of(content, kPage, {PageIndex{0}, 1}, key_of(1), 1), here);
}

TEST(PageTags, PagesMayBeTaggedInAnyOrderAndTwice) {
  const Bytes content = random_bytes(70 * kPage);
  const Bytes together = tags_of(content, kPage, {PageIndex{0}, 70});
  std::vector<uint64_t> pages(70);
  for (uint64_t i = 0; i < 70; ++i) pages[i] = i;
  std::shuffle(pages.begin(), pages.end(), std::minstd_rand());
  pages.push_back(5);
  Bytes apart(70 * kTag);
  for (const uint64_t page : pages) {
    const Bytes tag = tag_of(content, page);
    std::copy(tag.begin(), tag.end(), apart.begin() + static_cast<ptrdiff_t>(page * kTag));
  }
  EXPECT_EQ(apart, together);
}

/// Digests of all chunks of a region of 4 KiB pages.
Result<Bytes> digests(const Bytes& content, ChunkRequest request) {
  return digest_chunks(request, content.size() / kPage, kPage,
                       [&](PageTagger&, PageRun run, std::span<std::byte> tags) {
                         const Bytes made = tags_of(content, kPage, run);
                         std::copy(made.begin(), made.end(), tags.begin());
                         return ok();
                       });
}

TEST(ChunkDigests, AChangedPageChangesTheDigestOfItsChunkAlone) {
  Bytes content = random_bytes(1100 * kPage);  // two chunks, and a part of one
  const ChunkRequest all{key_of(1), 0, 0, 3};
  const auto right = digests(content, all);
  ASSERT_TRUE(right.ok());
  ASSERT_EQ(right.value().size(), 3 * kTag);
  content[600 * kPage] ^= std::byte{1};
  const auto wrong = digests(content, all);
  for (uint64_t chunk = 0; chunk < 3; ++chunk) {
    const auto at = static_cast<ptrdiff_t>(chunk * kTag);
    const bool same =
        std::equal(right.value().begin() + at, right.value().begin() + at + kTag, wrong.value().begin() + at);
    EXPECT_EQ(same, chunk != 1) << chunk;
  }
  // Pages that have changed places.
  content[600 * kPage] ^= std::byte{1};
  EXPECT_EQ(digests(content, all).value(), right.value());
  std::swap_ranges(content.begin(), content.begin() + kPage, content.begin() + kPage);
  EXPECT_NE(digests(content, all).value(), right.value());
}

TEST(ChunkDigests, APartOfTheChunksIsAPartOfTheDigests) {
  const Bytes content = random_bytes(1100 * kPage);
  const Bytes all = digests(content, {key_of(1), 0, 0, 3}).value();
  const Bytes last = digests(content, {key_of(1), 0, 2, 1}).value();
  EXPECT_TRUE(std::equal(last.begin(), last.end(), all.begin() + 2 * kTag));
  EXPECT_EQ(digests(content, {key_of(1), 0, 3, 0}).value().size(), 0u);
}

TEST(ChunkDigests, RefusesChunksThatTheRegionDoesNotHave) {
  const Bytes content(1100 * kPage);
  for (const ChunkRequest& wrong : {ChunkRequest{key_of(1), 0, 3, 1},
                                    {key_of(1), 0, 0, 4},
                                    {key_of(1), 0, 4, 0},
                                    {key_of(1), 0, ~0ull, 1},
                                    {key_of(1), 0, 1, ~0ull},
                                    {key_of(1), 0, 0, wire::kMemoryChunksMax + 1}}) {
    const auto refused = digests(content, wrong);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(TagFile, KeepsItsTagsForTheNextProcess) {
  const test::TempDir dir;
  const std::string path = dir / "ram.tags";
  {
    auto file = TagFile::create(path, 10);
    ASSERT_TRUE(file.ok());
    std::fill_n(file.value()->tags({PageIndex{7}, 1}).begin(), kTag, std::byte{9});
  }
  auto again = TagFile::reopen(path, 10);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again.value()->tags({PageIndex{7}, 1})[0], std::byte{9});
  EXPECT_EQ(again.value()->tags({PageIndex{6}, 1})[15], std::byte{0});
  // What an earlier session has left is none of a new one.
  auto anew = TagFile::create(path, 10);
  EXPECT_EQ(anew.value()->tags({PageIndex{7}, 1})[0], std::byte{0});
  EXPECT_EQ(again.value()->tags({PageIndex{7}, 1})[0], std::byte{9});
}

TEST(TagFile, TakesNoOtherFileForItsOwn) {
  const test::TempDir dir;
  EXPECT_FALSE(TagFile::reopen(dir / "none", 10).ok());
  ASSERT_TRUE(TagFile::create(dir / "tags", 10).ok());
  for (const uint64_t pages : {9, 11}) {
    const auto other = TagFile::reopen(dir / "tags", pages);
    ASSERT_FALSE(other.ok());
    EXPECT_EQ(other.error().code, ErrorCode::kCorrupt);
  }
  EXPECT_EQ(TagFile::create(dir / "tags", 0).error().code, ErrorCode::kInvalidArgument);
  ASSERT_EQ(::symlink((dir / "tags").c_str(), (dir / "link").c_str()), 0);
  EXPECT_FALSE(TagFile::reopen(dir / "link", 10).ok());
}

}  // namespace
}  // namespace vmigrate::memory
