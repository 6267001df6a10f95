#include "memory/page_hasher.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "base/unique_fd.hpp"
#include "tests/memory/page.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::memory {
namespace {

Digest digest_of(const void* bytes, size_t length_bytes) {
  unsigned char whole[32];
  EXPECT_EQ(::EVP_Digest(bytes, length_bytes, whole, nullptr, ::EVP_sha256(), nullptr), 1);
  Digest digest;
  std::memcpy(digest.data(), whole, digest.size());
  return digest;
}

class SparseFile {
 public:
  explicit SparseFile(uint64_t length_bytes)
      : fd(::open((dir_ / "ram").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), content(length_bytes) {
    EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(length_bytes)), 0);
  }
  void fill(uint64_t at_bytes, uint64_t length_bytes) {
    for (uint64_t i = 0; i < length_bytes; i += sizeof(uint64_t)) {
      const uint64_t word = random_();
      std::memcpy(&content[at_bytes + i], &word, std::min<uint64_t>(sizeof word, length_bytes - i));
    }
    EXPECT_EQ(::pwrite(fd.get(), &content[at_bytes], length_bytes, static_cast<off_t>(at_bytes)),
              static_cast<ssize_t>(length_bytes));
  }
  int64_t blocks() const {
    struct stat file {};
    EXPECT_EQ(::fstat(fd.get(), &file), 0);
    return file.st_blocks;
  }

 private:
  const test::TempDir dir_;
  std::mt19937_64 random_;

 public:
  const UniqueFd fd;
  std::vector<char> content;
};

void expect_digests(const SparseFile& file, uint64_t page_bytes, PageRun run) {
  auto hasher = PageHasher::create();
  ASSERT_TRUE(hasher.ok());
  hasher.value()->begin(file.fd.get(), page_bytes, run);
  for (uint64_t page = raw(run.first); page < raw(run.first) + run.count; ++page) {
    const auto digest = hasher.value()->next();
    ASSERT_TRUE(digest.ok()) << digest.error().what;
    EXPECT_EQ(digest.value(), digest_of(&file.content[page * page_bytes], page_bytes)) << page;
  }
}

TEST(PageHasher, KnowsTheDigestOfZerosOfEachPageSize) {
  const std::vector<char> zeros(kPage);
  for (const uint64_t page_bytes : {kPage, kLargePage, uint64_t{1} << 30}) {
    const std::unique_ptr<EVP_MD_CTX, decltype(&::EVP_MD_CTX_free)> hash(::EVP_MD_CTX_new(),
                                                                         &::EVP_MD_CTX_free);
    ASSERT_EQ(::EVP_DigestInit_ex(hash.get(), ::EVP_sha256(), nullptr), 1);
    for (uint64_t at_bytes = 0; at_bytes < page_bytes; at_bytes += kPage)
      ASSERT_EQ(::EVP_DigestUpdate(hash.get(), zeros.data(), kPage), 1);
    unsigned char whole[32];
    ASSERT_EQ(::EVP_DigestFinal_ex(hash.get(), whole, nullptr), 1);
    Digest digest;
    std::memcpy(digest.data(), whole, digest.size());
    EXPECT_EQ(digest_of_zeros(page_bytes), digest);
  }
  EXPECT_EQ(digest_of_zeros(8192), std::nullopt);
}

TEST(PageHasher, HashesDataAndHolesAndLeavesTheHoles) {
  SparseFile file(200 * kPage);
  for (const uint64_t page : {0, 1, 5, 17, 18, 19, 40, 199}) file.fill(page * kPage, kPage);
  file.fill(60 * kPage, 80 * kPage);
  file.fill(150 * kPage + 100, 1);  // most of the page is zeros
  const std::vector<char> zeros(kPage);
  ASSERT_EQ(::pwrite(file.fd.get(), zeros.data(), kPage, 160 * kPage), static_cast<ssize_t>(kPage));
  const int64_t before = file.blocks();
  for (const PageRun run : {PageRun{PageIndex{0}, 200},
                            {PageIndex{3}, 5},
                            {PageIndex{18}, 1},
                            {PageIndex{2}, 2},
                            {PageIndex{100}, 100},
                            {PageIndex{141}, 5},
                            {PageIndex{199}, 1},
                            {PageIndex{50}, 0}}) {
    expect_digests(file, kPage, run);
  }
  EXPECT_EQ(file.blocks(), before);
}

TEST(PageHasher, HashesLargePagesThatAreHolesInPart) {
  SparseFile file(6 * kLargePage);
  file.fill(0, kLargePage);
  file.fill(2 * kLargePage + 3 * kPage, kPage);
  file.fill(5 * kLargePage - kPage, 2 * kPage);
  const int64_t before = file.blocks();
  expect_digests(file, kLargePage, {PageIndex{0}, 6});
  expect_digests(file, kLargePage, {PageIndex{3}, 2});
  EXPECT_EQ(file.blocks(), before);
}

/// Cut before the run, within it, and between two pages of it.
TEST(PageHasher, AFileThatWasCutIsAnErrorAndNoSignal) {
  for (const uint64_t page_bytes : {kPage, kLargePage}) {
    for (const bool has_data : {true, false}) {
      for (const uint64_t left : {0u, 3u, 20u}) {
        SparseFile file(40 * page_bytes);
        if (has_data) file.fill(0, 40 * page_bytes);
        auto hasher = PageHasher::create();
        ASSERT_TRUE(hasher.ok());
        hasher.value()->begin(file.fd.get(), page_bytes, {PageIndex{2}, 38});
        ASSERT_EQ(::ftruncate(file.fd.get(), static_cast<off_t>(left * page_bytes)), 0);
        ErrorCode code{};
        for (uint64_t page = 2; page < 40 && code == ErrorCode{}; ++page)
          if (const auto digest = hasher.value()->next(); !digest) code = digest.error().code;
        EXPECT_EQ(code, ErrorCode::kRegionChanged);
      }
    }
  }
}

}  // namespace
}  // namespace vmigrate::memory
