#include "source/write_tracker.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>
#include <set>
#include <thread>

#include "memory/region.hpp"
#include "source/dirty_maps.hpp"
#include "tests/support/pager_harness.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::kPage;

constexpr uint64_t kPages = 2048;
constexpr uint64_t kAsyncFeatures = UFFD_FEATURE_PAGEFAULT_FLAG_WP | (1 << 12) | (1 << 13) | (1 << 15);

/// This process, as a VM with one region in two ranges.
class Tracked : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto support = uffd::probe();
    if (!support.wp_async || !support.pagemap_scan) GTEST_SKIP() << "this kernel does not track writes";
    file_.reset(::memfd_create("ram", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(file_.get(), kPages * kPage), 0);
    void* base = ::mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
    ASSERT_NE(base, MAP_FAILED);
    base_ = static_cast<std::byte*>(base);
    // The second half is in use, the first has holes.
    for (uint64_t page = kPages / 2; page < kPages; ++page) write(page);
    const int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    ASSERT_GE(fd, 0);
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = kAsyncFeatures;
    ASSERT_EQ(::ioctl(fd, UFFDIO_API, &api), 0);
    memory_.pid = ::getpid();
    memory_.descriptors.push_back({UniqueFd(fd), fd, wire::PreloadDescriptor::kAsyncWp});
    const HostAddr address{reinterpret_cast<uint64_t>(base)};
    const uint64_t half = kPages / 2 * kPage;
    memory_.ranges = {{0, 0, half, address, 0}, {0, half, half, address + half, 0}};
  }
  void TearDown() override {
    tracker_.reset();
    if (base_ != nullptr) ::munmap(base_, kPages * kPage);
  }

  void write(uint64_t page) {
    __atomic_fetch_add(reinterpret_cast<uint64_t*>(base_ + page * kPage), 1, __ATOMIC_RELAXED);
  }
  void start() {
    auto started = WriteTracker::start(memory_);
    ASSERT_TRUE(started.ok()) << started.error().what << ": " << strerror(started.error().system_errno);
    tracker_ = std::move(started).value();
  }
  void start_maps(std::unique_ptr<DirtyMaps>& maps) {
    auto started = DirtyMaps::start(memory_);
    ASSERT_TRUE(started.ok());
    // Only its geometry counts.
    const test::TempDir dir;
    ASSERT_TRUE(memory::Region::create_file(dir / "ram", kPages * kPage, kPage).ok());
    auto region = memory::Region::open(dir / "ram", kPages * kPage, kPage, memory::Mode::kReadOnly);
    ASSERT_TRUE(region.ok());
    ASSERT_TRUE(started.value()->add(*region.value()).ok());
    maps = std::move(started).value();
  }
  std::set<uint64_t> written(bool is_last = false) {
    std::set<uint64_t> pages;
    const auto visit = [&](uint32_t region, uint64_t offset_bytes, uint64_t length_bytes) {
      EXPECT_EQ(region, 0u);
      for (uint64_t at = 0; at < length_bytes; at += kPage) pages.insert((offset_bytes + at) / kPage);
    };
    EXPECT_TRUE((is_last ? tracker_->take_last(visit) : tracker_->take(visit)).ok());
    return pages;
  }

  UniqueFd file_;
  std::byte* base_ = nullptr;
  VmMemory memory_;
  std::unique_ptr<WriteTracker> tracker_;
};

using Pages = std::set<uint64_t>;

TEST_F(Tracked, EachWriteIsSeenOnce) {
  start();
  EXPECT_EQ(written(), Pages{});
  const Pages some{0, 3, 700, kPages / 2, kPages / 2 + 1, kPages - 1};
  for (const uint64_t page : some) write(page);
  EXPECT_EQ(written(), some);
  EXPECT_EQ(written(), Pages{});
  write(3);
  write(9);
  EXPECT_EQ(written(/*is_last=*/true), (Pages{3, 9}));
}

TEST_F(Tracked, MoreRunsThanOneCallOfTheKernelReturnsAreAllSeen) {
  start();
  Pages every_other;
  for (uint64_t page = 0; page < kPages; page += 2) every_other.insert(page);
  for (const uint64_t page : every_other) write(page);
  EXPECT_EQ(written(), every_other);
  EXPECT_EQ(written(), Pages{});
}

TEST_F(Tracked, AWrittenPageWhoseEntryTheKernelHasDroppedCounts) {
  start();
  write(1500);
  // As reclaim does it: the bytes stay in the file, and nothing is mapped.
  ASSERT_EQ(::madvise(base_ + 1500 * kPage, kPage, MADV_DONTNEED), 0);
  EXPECT_EQ(written(), Pages{1500});
  EXPECT_EQ(written(), Pages{}) << "from here on it has a marker";
  ASSERT_EQ(::madvise(base_ + 1500 * kPage, kPage, MADV_DONTNEED), 0);
  EXPECT_EQ(written(/*is_last=*/true), Pages{}) << "an unwritten page keeps its marker";
}

TEST_F(Tracked, NoWriteIsLostBetweenRounds) {
  start();
  std::vector<uint64_t> copy(kPages);
  const auto word = [&](uint64_t page) {
    return __atomic_load_n(reinterpret_cast<uint64_t*>(base_ + page * kPage), __ATOMIC_RELAXED);
  };
  const auto fetch = [&](const Pages& pages) {
    for (const uint64_t page : pages) copy[page] = word(page);
  };
  for (uint64_t page = 0; page < kPages; ++page) copy[page] = word(page);
  std::atomic<bool> has_stopped{false};
  std::vector<std::thread> vcpus;
  for (unsigned seed = 1; seed <= 2; ++seed) {
    vcpus.emplace_back([&, seed] {
      std::minstd_rand random(seed);
      while (!has_stopped.load(std::memory_order_relaxed))
        __atomic_fetch_add(reinterpret_cast<uint64_t*>(base_ + random() % kPages * kPage), 1,
                           __ATOMIC_RELAXED);
    });
  }
  uint64_t seen = 0;
  EXPECT_TRUE(test::eventually([&] {
    const Pages pages = written();
    seen += pages.size();
    fetch(pages);
    return seen > 4 * kPages;
  }));
  has_stopped = true;
  for (std::thread& vcpu : vcpus) vcpu.join();
  fetch(written(/*is_last=*/true));
  for (uint64_t page = 0; page < kPages; ++page) ASSERT_EQ(copy[page], word(page)) << page;
}

TEST_F(Tracked, CountsWhatTwoRoundsHaveInCommon) {
  std::unique_ptr<DirtyMaps> started;
  ASSERT_NO_FATAL_FAILURE(start_maps(started));
  DirtyMaps& maps = *started;
  const auto again = [&](std::initializer_list<uint64_t> pages) {
    for (const uint64_t page : pages) write(page);
    const auto noted = maps.note(/*is_last=*/false);
    EXPECT_EQ(noted.value().page_count, pages.size());
    return noted.value().again_count;
  };
  EXPECT_EQ(again({1, 7, 8}), 0u);
  EXPECT_EQ(again({1, 8, 9}), 2u);
  EXPECT_EQ(again({}), 0u);
  EXPECT_EQ(again({1}), 0u) << "it was not in the round before";
}

TEST_F(Tracked, AWriteAfterTheLastRoundIsNoticed) {
  std::unique_ptr<DirtyMaps> started;
  ASSERT_NO_FATAL_FAILURE(start_maps(started));
  DirtyMaps& maps = *started;
  write(5);
  EXPECT_EQ(maps.note(/*is_last=*/false).value().page_count, 1u);
  EXPECT_FALSE(maps.has_changed_since_last().ok()) << "there was no last round";
  write(6);
  const auto last = maps.note(/*is_last=*/true);
  EXPECT_EQ(last.value().number, 2u);
  EXPECT_EQ(last.value().page_count, 1u);
  EXPECT_FALSE(maps.note(/*is_last=*/false).ok());
  EXPECT_FALSE(maps.has_changed_since_last().value());
  write(6);
  EXPECT_FALSE(maps.has_changed_since_last().value()) << "the last round names it";
  write(7);
  EXPECT_TRUE(maps.has_changed_since_last().value());
}

TEST_F(Tracked, AfterwardsTheMemoryBelongsToNobody) {
  start();
  WriteTracker::release(memory_);
  start();
  tracker_.reset();
  const UniqueFd other(test::open_userfaultfd());
  for (const MappedRange& range : memory_.ranges) {
    const auto registered = uffd::register_range(other.get(), range.base, range.length_bytes,
                                                 static_cast<uint64_t>(uffd::Mode::kMinor));
    EXPECT_EQ(registered.outcome, uffd::Outcome::kDone);
  }
}

TEST_F(Tracked, MemoryThatSomebodyElseHasIsNotTracked) {
  const UniqueFd other(test::open_userfaultfd());
  const MappedRange& second = memory_.ranges[1];
  ASSERT_EQ(uffd::register_range(other.get(), second.base, second.length_bytes,
                                 static_cast<uint64_t>(uffd::Mode::kMinor))
                .outcome,
            uffd::Outcome::kDone);
  const auto started = WriteTracker::start(memory_);
  ASSERT_FALSE(started.ok());
  EXPECT_EQ(started.error().code, ErrorCode::kUnsupported);
  memory_.descriptors[0].kind = wire::PreloadDescriptor::kSync;
  EXPECT_EQ(WriteTracker::start(memory_).error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace vmigrate::pager
