#include "memory/region.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <vector>

#include "tests/memory/page.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::memory {
namespace {

TEST(Region, CreatesASparsePrivateFileOnce) {
  test::TempDir dir;
  ASSERT_TRUE(Region::create_file(dir / "ram", 64 * kPage, kPage).ok());
  struct stat file {};
  ASSERT_EQ(::stat((dir / "ram").c_str(), &file), 0);
  EXPECT_EQ(static_cast<uint64_t>(file.st_size), 64 * kPage);
  EXPECT_EQ(file.st_blocks, 0);
  EXPECT_EQ(file.st_mode & 0777, 0600u);
  const auto again = Region::create_file(dir / "ram", 64 * kPage, kPage);
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().code, ErrorCode::kAlreadyExists);
}

TEST(Region, RefusesImpossibleGeometry) {
  test::TempDir dir;
  for (const auto& [length, page] : std::vector<std::pair<uint64_t, uint64_t>>{{0, kPage},
                                                                               {kPage, 0},
                                                                               {kPage, 8192},
                                                                               {kPage + 1, kPage},
                                                                               {kPage, 2 << 20},
                                                                               {UINT64_MAX, kPage},
                                                                               {1ull << 63, kPage}}) {
    const auto created = Region::create_file(dir / "ram", length, page);
    ASSERT_FALSE(created.ok()) << length << " " << page;
    EXPECT_EQ(created.error().code, ErrorCode::kInvalidArgument);
    const auto opened = Region::open(dir / "ram", length, page, Mode::kReadOnly);
    ASSERT_FALSE(opened.ok());
    EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);
  }
  EXPECT_NE(::access((dir / "ram").c_str(), F_OK), 0);
}

TEST(Region, RefusesAnotherLengthAndWhatIsNoRegularFile) {
  test::TempDir dir;
  ASSERT_TRUE(Region::create_file(dir / "ram", 8 * kPage, kPage).ok());
  auto opened = Region::open(dir / "ram", 16 * kPage, kPage, Mode::kReadWrite);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kRegionChanged);

  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  opened = Region::open(dir / "fifo", 8 * kPage, kPage, Mode::kReadOnly);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);

  ASSERT_EQ(::symlink((dir / "ram").c_str(), (dir / "link").c_str()), 0);
  EXPECT_FALSE(Region::open(dir / "link", 8 * kPage, kPage, Mode::kReadOnly).ok());

  if (::geteuid() == 0) {
    ASSERT_EQ(::chown((dir / "ram").c_str(), 65534, 65534), 0);
    opened = Region::open(dir / "ram", 8 * kPage, kPage, Mode::kReadOnly);
    ASSERT_FALSE(opened.ok());
    EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);
  }

  opened = Region::open(dir / "nothing", 8 * kPage, kPage, Mode::kReadOnly);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kNotFound);
}

TEST(Region, SaysNoSpaceWhenTheFileSystemIsTooSmall) {
  test::TempDir dir;
  if (::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=1m") != 0)
    GTEST_SKIP() << "mount: not permitted here";
  const auto created = Region::create_file(dir / "ram", 2 << 20, kPage);
  EXPECT_EQ(created.ok() ? ErrorCode{} : created.error().code, ErrorCode::kNoSpace);
  EXPECT_NE(::access((dir / "ram").c_str(), F_OK), 0) << "nothing may be left over";
  ::umount(dir.path().c_str());
}

std::vector<std::pair<uint64_t, uint64_t>> runs_of(const Region& region) {
  std::vector<std::pair<uint64_t, uint64_t>> runs;
  EXPECT_TRUE(region.each_data_run([&](PageRun run) { runs.emplace_back(raw(run.first), run.count); }).ok());
  return runs;
}

TEST(Region, ListsDataRunsWithoutTouchingHoles) {
  test::TempDir dir;
  ASSERT_TRUE(Region::create_file(dir / "ram", 64 * kPage, kPage).ok());
  auto opened = Region::open(dir / "ram", 64 * kPage, kPage, Mode::kReadWrite);
  ASSERT_TRUE(opened.ok());
  const Region& region = *opened.value();
  EXPECT_TRUE(runs_of(region).empty());
  for (const uint64_t page : {0, 1, 5, 63}) {
    ASSERT_EQ(::pwrite(region.fd(), "x", 1, static_cast<off_t>(page * kPage + 17)), 1);
  }
  using Runs = std::vector<std::pair<uint64_t, uint64_t>>;
  EXPECT_EQ(runs_of(region), (Runs{{0, 2}, {5, 1}, {63, 1}}));
  struct stat file {};
  ASSERT_EQ(::fstat(region.fd(), &file), 0);
  EXPECT_EQ(file.st_blocks, 4 * 8);
}

TEST(Region, WidensDataRunsToItsOwnPageSize) {
  test::TempDir dir;
  const uint64_t big = 2 << 20;
  ASSERT_TRUE(Region::create_file(dir / "ram", 4 * big, big).ok());
  auto opened = Region::open(dir / "ram", 4 * big, big, Mode::kReadWrite);
  ASSERT_TRUE(opened.ok());
  for (const uint64_t offset : {uint64_t{0}, 7 * kPage, 300 * kPage, 3 * big + 5}) {
    ASSERT_EQ(::pwrite(opened.value()->fd(), "x", 1, static_cast<off_t>(offset)), 1);
  }
  using Runs = std::vector<std::pair<uint64_t, uint64_t>>;
  EXPECT_EQ(runs_of(*opened.value()), (Runs{{0, 1}, {3, 1}}));
}

TEST(Region, NoticesAFileThatShrinksBeforeOrDuringTheWalk) {
  test::TempDir dir;
  ASSERT_TRUE(Region::create_file(dir / "ram", 64 * kPage, kPage).ok());
  auto opened = Region::open(dir / "ram", 64 * kPage, kPage, Mode::kReadOnly);
  ASSERT_TRUE(opened.ok());
  const int fd = ::open((dir / "ram").c_str(), O_RDWR | O_CLOEXEC);
  for (uint64_t page = 0; page < 64; page += 2)
    ASSERT_EQ(::pwrite(fd, "x", 1, static_cast<off_t>(page * kPage)), 1);
  const auto walked = opened.value()->each_data_run([&](PageRun) { (void)!::ftruncate(fd, 10 * kPage); });
  ASSERT_FALSE(walked.ok());
  EXPECT_EQ(walked.error().code, ErrorCode::kRegionChanged);
  ::close(fd);
}

using Runs = std::vector<std::pair<uint64_t, uint64_t>>;

Runs nonzero_runs_of(const Region& region, PageRun within) {
  Runs runs;
  const auto visit = [&](PageRun run) { runs.emplace_back(raw(run.first), run.count); };
  EXPECT_TRUE(region.each_nonzero_run(within, visit).ok());
  return runs;
}

TEST(Region, FindsPagesThatHoldAnythingAmongAllocatedOnes) {
  test::TempDir dir;
  const uint64_t count = 200;  // more than one system call reads
  ASSERT_TRUE(Region::create_file(dir / "ram", count * kPage, kPage).ok());
  auto opened = Region::open(dir / "ram", count * kPage, kPage, Mode::kReadWrite);
  ASSERT_TRUE(opened.ok());
  const Region& region = *opened.value();
  ASSERT_EQ(::posix_fallocate(region.fd(), 0, count * kPage), 0);
  const PageRun all{PageIndex{0}, count};
  EXPECT_EQ(nonzero_runs_of(region, all), Runs{});
  // Covers the first and last byte of a page, and runs that cross the limit of one read.
  for (const uint64_t offset :
       {uint64_t{0}, 3 * kPage - 1, 63 * kPage, 64 * kPage + 9, 65 * kPage, count * kPage - 1})
    ASSERT_EQ(::pwrite(region.fd(), "x", 1, static_cast<off_t>(offset)), 1);
  EXPECT_EQ(nonzero_runs_of(region, all), (Runs{{0, 1}, {2, 1}, {63, 3}, {199, 1}}));
  EXPECT_EQ(nonzero_runs_of(region, {PageIndex{1}, 64}), (Runs{{2, 1}, {63, 2}}));
  EXPECT_EQ(nonzero_runs_of(region, {PageIndex{1}, 0}), Runs{});
  ASSERT_EQ(::ftruncate(region.fd(), 100 * kPage), 0);
  const Status shrunk = region.each_nonzero_run(all, [](PageRun) {});
  ASSERT_FALSE(shrunk.ok());
  EXPECT_EQ(shrunk.error().code, ErrorCode::kRegionChanged);
}

TEST(Region, LooksIntoTheWholeOfALargePage) {
  test::TempDir dir;
  const uint64_t big = 2 << 20;
  ASSERT_TRUE(Region::create_file(dir / "ram", 4 * big, big).ok());
  auto opened = Region::open(dir / "ram", 4 * big, big, Mode::kReadWrite);
  ASSERT_TRUE(opened.ok());
  for (const uint64_t offset : {2 * big - 1, 2 * big})
    ASSERT_EQ(::pwrite(opened.value()->fd(), "x", 1, static_cast<off_t>(offset)), 1);
  EXPECT_EQ(nonzero_runs_of(*opened.value(), {PageIndex{0}, 4}), (Runs{{1, 2}}));
}

}  // namespace
}  // namespace vmigrate::memory
