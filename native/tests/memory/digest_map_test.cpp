#include "memory/digest_map.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "tests/memory/page.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::memory {
namespace {

constexpr uint64_t kCount = 100;

std::vector<std::byte> some_digests(uint64_t first, uint64_t count) {
  std::vector<std::byte> bytes(count * wire::kDigestBytes);
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::byte>((first * wire::kDigestBytes + i) * 7);
  return bytes;
}

std::unique_ptr<DigestMap> must_open(const std::string& path, uint64_t page_count = kCount,
                                     uint64_t page_bytes = kPage) {
  auto map = DigestMap::open_or_create(path, page_count, page_bytes);
  EXPECT_TRUE(map.ok()) << (map.ok() ? "" : map.error().what);
  return std::move(map).value();
}

bool has(const DigestMap& map, uint64_t first, uint64_t count) {
  const auto wanted = some_digests(first, count);
  const auto found = map.digests({PageIndex{first}, count});
  return std::equal(found.begin(), found.end(), wanted.begin(), wanted.end());
}

TEST(DigestMap, KeepsWhatIsKnownForTheNextProcess) {
  const test::TempDir dir;
  {
    auto map = must_open(dir / "digests");
    EXPECT_EQ(map->known(), 0u);
    map->append(some_digests(0, 3));
    map->append({});
    map->append(some_digests(3, 40));
    EXPECT_EQ(map->known(), 43u);
  }
  auto map = must_open(dir / "digests");
  EXPECT_EQ(map->known(), 43u);
  EXPECT_TRUE(has(*map, 0, 43));
  const Digest digest = map->digest(PageIndex{42});
  EXPECT_EQ(std::memcmp(digest.data(), some_digests(42, 1).data(), digest.size()), 0);
  map->append(some_digests(43, kCount - 43));
  EXPECT_TRUE(has(*map, 0, kCount));
  struct stat file {};
  ASSERT_EQ(::stat((dir / "digests").c_str(), &file), 0);
  EXPECT_EQ(static_cast<uint64_t>(file.st_size), wire::kDigestsHeaderBytes + kCount * wire::kDigestBytes);
  EXPECT_GE(file.st_blocks * 512, file.st_size) << "no store may meet a full file system";
  EXPECT_EQ(file.st_mode & 0777u, 0600u);
}

/// Each damage to a file in which all digests are known.
TEST(DigestMap, ReplacesAFileThatIsTornForeignOrOld) {
  const auto put = [](uint64_t at, uint64_t value, size_t length_bytes) {
    return [=](int fd) {
      EXPECT_EQ(::pwrite(fd, &value, length_bytes, static_cast<off_t>(at)),
                static_cast<ssize_t>(length_bytes));
    };
  };
  const std::vector<std::pair<const char*, std::function<void(int)>>> damages{
      {"no header", put(0, 0, 8)},
      {"another file's magic", put(0, wire::kPresenceMagic, 4)},
      {"another version", put(4, wire::kDigestsVersion + 1, 4)},
      {"another page size", put(8, 2 << 20, 8)},
      {"another number of pages", put(16, kCount - 1, 8)},
      {"more known than there are", put(24, kCount + 1, 8)},
      {"known overflows", put(24, UINT64_MAX, 8)},
      {"too short", [](int fd) { EXPECT_EQ(::ftruncate(fd, wire::kDigestsHeaderBytes + 1), 0); }},
      {"empty", [](int fd) { EXPECT_EQ(::ftruncate(fd, 0), 0); }},
      {"too long", [](int fd) { EXPECT_EQ(::ftruncate(fd, 1 << 20), 0); }},
  };
  for (const auto& [name, damage] : damages) {
    SCOPED_TRACE(name);
    const test::TempDir dir;
    const std::string path = dir / "digests";
    auto old = must_open(path);
    old->append(some_digests(0, kCount));
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (std::strstr(name, "short") != nullptr || std::strstr(name, "empty") != nullptr) old.reset();
    damage(fd);
    ::close(fd);
    auto map = must_open(path);
    EXPECT_EQ(map->known(), 0u);
    map->append(some_digests(0, kCount));
    EXPECT_TRUE(has(*map, 0, kCount));
  }
}

TEST(DigestMap, FollowsNoLinkAndReplacesWhatIsNoFile) {
  const test::TempDir dir;
  { must_open(dir / "other")->append(some_digests(0, 5)); }
  ASSERT_EQ(::symlink((dir / "other").c_str(), (dir / "digests").c_str()), 0);
  EXPECT_EQ(must_open(dir / "digests")->known(), 0u);
  EXPECT_FALSE(std::filesystem::is_symlink(dir / "digests"));
  EXPECT_EQ(must_open(dir / "other")->known(), 5u);
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(must_open(dir / "fifo")->known(), 0u);
  ASSERT_TRUE(std::filesystem::create_directory(dir / "directory"));
  EXPECT_FALSE(DigestMap::open_or_create(dir / "directory", kCount, kPage).ok());
}

TEST(DigestMap, RefusesImpossibleNumbersOfPages) {
  const test::TempDir dir;
  for (const uint64_t count : {uint64_t{0}, UINT64_MAX, UINT64_MAX / 16}) {
    const auto map = DigestMap::open_or_create(dir / "digests", count, kPage);
    ASSERT_FALSE(map.ok());
    EXPECT_EQ(map.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(DigestMap, WhoSeesTheNumberSeesTheDigests) {
  const test::TempDir dir;
  constexpr uint64_t kMany = 20000;
  auto map = must_open(dir / "digests", kMany);
  std::thread writer([&] {
    for (uint64_t page = 0; page < kMany; page += 8) map->append(some_digests(page, 8));
  });
  for (uint64_t seen = 0; seen < kMany;) {
    const uint64_t known = map->known();
    if (known > seen) {
      EXPECT_TRUE(has(*map, seen, known - seen));
    }
    seen = known;
  }
  writer.join();
}

TEST(DigestMapDeathTest, MoreThanThereIsRoomForStopsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const test::TempDir dir;
  auto map = must_open(dir / "digests");
  map->append(some_digests(0, kCount - 1));
  EXPECT_DEATH((std::filesystem::remove_all(dir.path()), map->append(some_digests(0, 2))),
               "invariant broken");
}

}  // namespace
}  // namespace vmigrate::memory
