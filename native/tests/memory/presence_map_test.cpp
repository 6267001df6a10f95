#include "memory/presence_map.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>

#include <atomic>
#include <filesystem>
#include <random>
#include <thread>
#include <vector>

#include "tests/memory/page.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::memory {
namespace {

constexpr PageIndex kFirst{0};
constexpr std::array kStates{PageState::kAbsent, PageState::kClaimed, PageState::kPresent, PageState::kZero};

std::unique_ptr<PresenceMap> make(const std::string& path, uint64_t page_count) {
  auto map = PresenceMap::create(path, page_count, kPage);
  EXPECT_TRUE(map.ok());
  return std::move(map).value();
}

/// For a process that ends on purpose, and so without destructors. What is mapped stays.
void remove(const test::TempDir& dir) {
  std::filesystem::remove_all(dir.path());
}

void bring_to(PresenceMap& map, PageIndex page, PageState state) {
  if (state == PageState::kZero) {
    ASSERT_TRUE(map.mark_zero(page));
  }
  if (state == PageState::kClaimed || state == PageState::kPresent) {
    ASSERT_TRUE(map.claim(page));
  }
  if (state == PageState::kPresent) map.publish({page, 1});
}

TEST(PresenceMap, EveryOperationInEveryStateObeysTheTable) {
  enum class Operation { kClaim, kMarkZero };
  for (const PageState from : kStates) {
    for (const auto& [operation, to] :
         {std::pair{Operation::kClaim, PageState::kClaimed}, {Operation::kMarkZero, PageState::kZero}}) {
      test::TempDir dir;
      auto map = make(dir / "presence", 1);
      bring_to(*map, kFirst, from);
      const bool moved = operation == Operation::kClaim ? map->claim(kFirst) : map->mark_zero(kFirst);
      EXPECT_EQ(moved, transition_allowed(from, to));
      EXPECT_EQ(map->state(kFirst), moved ? to : from);
    }
  }
}

TEST(PresenceMapDeathTest, PublishAndUnclaimOutsideTheTableStopTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (const PageState from : kStates) {
    test::TempDir dir;
    auto map = make(dir / "presence", 1);
    bring_to(*map, kFirst, from);
    if (transition_allowed(from, PageState::kPresent)) {
      map->publish({kFirst, 1});
      EXPECT_EQ(map->state(kFirst), PageState::kPresent);
    } else {
      EXPECT_DEATH((remove(dir), map->publish({kFirst, 1})), "invariant broken");
    }
  }
  for (const PageState from : kStates) {
    test::TempDir dir;
    auto map = make(dir / "presence", 1);
    bring_to(*map, kFirst, from);
    if (transition_allowed(from, PageState::kAbsent)) {
      map->unclaim({kFirst, 1});
      EXPECT_EQ(map->state(kFirst), PageState::kAbsent);
    } else {
      EXPECT_DEATH((remove(dir), map->unclaim({kFirst, 1})), "invariant broken");
    }
  }
}

TEST(PresenceMapDeathTest, TakingBackMakesAbsentWhateverIsNotClaimed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (const PageState from : kStates) {
    test::TempDir dir;
    auto map = make(dir / "presence", 1);
    bring_to(*map, kFirst, from);
    if (from == PageState::kClaimed) {
      EXPECT_DEATH((remove(dir), map->take_back({kFirst, 1})), "invariant broken");
      continue;
    }
    const auto taken = map->take_back({kFirst, 1});
    EXPECT_EQ(map->state(kFirst), PageState::kAbsent);
    EXPECT_EQ(taken.present_pages, from == PageState::kPresent ? 1u : 0u);
    EXPECT_EQ(taken.zero_pages, from == PageState::kZero ? 1u : 0u);
  }
}

TEST(PresenceMap, TheTableHasExactlyTheMovesThatAreDocumented) {
  int allowed = 0;
  for (const PageState from : kStates) {
    for (const PageState to : kStates) allowed += transition_allowed(from, to) ? 1 : 0;
  }
  EXPECT_EQ(allowed, 4);
  EXPECT_TRUE(transition_allowed(PageState::kAbsent, PageState::kClaimed));
  EXPECT_TRUE(transition_allowed(PageState::kAbsent, PageState::kZero));
  EXPECT_TRUE(transition_allowed(PageState::kClaimed, PageState::kPresent));
  EXPECT_TRUE(transition_allowed(PageState::kClaimed, PageState::kAbsent));
}

TEST(PresenceMap, RunsEndAtTheFirstPageThatIsTaken) {
  test::TempDir dir;
  auto map = make(dir / "presence", 10);
  ASSERT_TRUE(map->claim(PageIndex{4}));
  EXPECT_EQ(map->claim_run(PageIndex{0}, 100), 4u);
  EXPECT_EQ(map->claim_run(PageIndex{0}, 100), 0u);
  EXPECT_EQ(raw(map->next_absent(PageIndex{0})), 5u);
  EXPECT_EQ(map->claim_run(PageIndex{5}, 3), 3u);
  EXPECT_EQ(map->claim_run(PageIndex{8}, 100), 2u);
  EXPECT_EQ(raw(map->next_absent(PageIndex{0})), 10u);
  EXPECT_EQ(raw(map->next_absent(PageIndex{10})), 10u);
}

TEST(PresenceMap, SurvivesItsProcessButClaimsDoNot) {
  test::TempDir dir;
  {
    auto map = make(dir / "presence", 4);
    bring_to(*map, PageIndex{1}, PageState::kClaimed);
    bring_to(*map, PageIndex{2}, PageState::kPresent);
    bring_to(*map, PageIndex{3}, PageState::kZero);
  }
  std::vector<uint64_t> wiped;
  auto reopened = PresenceMap::reopen(dir / "presence", 4, kPage, [&](PageRun run) {
    wiped.insert(wiped.end(), {raw(run.first), run.count});
    return ok();
  });
  ASSERT_TRUE(reopened.ok());
  EXPECT_EQ(reopened.value()->state(PageIndex{0}), PageState::kAbsent);
  EXPECT_EQ(reopened.value()->state(PageIndex{1}), PageState::kAbsent);
  EXPECT_EQ(reopened.value()->state(PageIndex{2}), PageState::kPresent);
  EXPECT_EQ(reopened.value()->state(PageIndex{3}), PageState::kZero);
  EXPECT_EQ(wiped, (std::vector<uint64_t>{1, 1}));
}

TEST(PresenceMap, CreateReplacesAMapThatIsLeftOver) {
  test::TempDir dir;
  auto old = make(dir / "presence", 4);
  bring_to(*old, PageIndex{2}, PageState::kPresent);
  auto fresh = make(dir / "presence", 4);
  EXPECT_EQ(fresh->state(PageIndex{2}), PageState::kAbsent);
  EXPECT_EQ(old->state(PageIndex{2}), PageState::kPresent) << "who still has the old one keeps it";
}

TEST(PresenceMap, RefusesWhatNoMapOfThisRegionCanBe) {
  test::TempDir dir;
  const std::string path = dir / "presence";
  const auto reopen_code = [&](uint64_t pages = 4, uint64_t page_bytes = kPage) {
    const auto map = PresenceMap::reopen(path, pages, page_bytes, [](PageRun) { return ok(); });
    return map.ok() ? ErrorCode{} : map.error().code;
  };
  EXPECT_EQ(reopen_code(), ErrorCode::kNotFound);
  make(path, 4);
  EXPECT_EQ(reopen_code(), ErrorCode{});
  EXPECT_EQ(reopen_code(5), ErrorCode::kCorrupt);
  EXPECT_EQ(reopen_code(4, 2 << 20), ErrorCode::kCorrupt);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, "\x04", 1, wire::kPresenceHeaderBytes + 2), 1);
  EXPECT_EQ(reopen_code(), ErrorCode::kCorrupt);
  ASSERT_EQ(::pwrite(fd, "\x00", 1, wire::kPresenceHeaderBytes + 2), 1);
  EXPECT_EQ(reopen_code(), ErrorCode{});
  for (const off_t offset : {0, 4, 8, 16}) {  // magic, version, page_bytes, page_count
    char before;
    ASSERT_EQ(::pread(fd, &before, 1, offset), 1);
    ASSERT_EQ(::pwrite(fd, "\x7f", 1, offset), 1);
    EXPECT_EQ(reopen_code(), ErrorCode::kCorrupt) << offset;
    ASSERT_EQ(::pwrite(fd, &before, 1, offset), 1);
  }
  ASSERT_EQ(::ftruncate(fd, wire::kPresenceHeaderBytes), 0);
  EXPECT_EQ(reopen_code(), ErrorCode::kCorrupt);
  ::close(fd);
  EXPECT_EQ(PresenceMap::create(path, 0, kPage).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(PresenceMap::create(path, UINT64_MAX, kPage).error().code, ErrorCode::kInvalidArgument);
}

TEST(PresenceMap, AllocatesItsFileBeforeItIsUsed) {
  test::TempDir dir;
  if (::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=64k") != 0)
    GTEST_SKIP() << "mount: not permitted here";
  const auto map = PresenceMap::create(dir / "presence", 1 << 20, kPage);
  EXPECT_EQ(map.ok() ? ErrorCode{} : map.error().code, ErrorCode::kNoSpace);
  ::umount(dir.path().c_str());
}

// A random walk of several threads. Each page is claimed exactly once, then published once or given back. Its
// payload is written before publish, and every thread that sees the page present sees the payload.
TEST(PresenceMap, RandomThreadsClaimEachPageExactlyOnce) {
  constexpr uint64_t kPages = 20'000;
  constexpr int kThreads = 4;
  for (const uint32_t seed : {1u, 2u, 3u}) {
    test::TempDir dir;
    auto map = make(dir / "presence", kPages);
    std::vector<uint64_t> payload(kPages, 0);  // plain memory: the sanitizer checks the ordering
    std::vector<std::atomic<int>> taken(kPages);
    std::atomic<uint64_t> bad{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(seed * 100 + static_cast<uint32_t>(t));
        const auto fill = [&](PageRun run) {
          for (uint64_t p = raw(run.first); p < raw(run.first) + run.count; ++p) {
            taken[p].fetch_add(1);
            payload[p] = p + 1;
          }
          map->publish(run);
        };
        for (int i = 0; i < 20'000; ++i) {
          const PageIndex page{random() % kPages};
          switch (random() % 5) {
            case 0:
              if (map->claim(page)) fill({page, 1});
              break;
            case 1: {
              const uint64_t count = map->claim_run(page, 1 + random() % 16);
              if (count != 0) fill({page, count});
              break;
            }
            case 2:
              if (map->mark_zero(page)) taken[raw(page)].fetch_add(1);
              break;
            case 3:
              if (map->claim(page)) map->unclaim({page, 1});
              break;
            default:
              if (map->state(page) == PageState::kPresent && payload[raw(page)] != raw(page) + 1) ++bad;
          }
        }
        PageIndex at{0};
        while (raw(at = map->next_absent(at)) < kPages) {
          if (const uint64_t count = map->claim_run(at, 64)) fill({at, count});
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(bad, 0u);
    for (uint64_t p = 0; p < kPages; ++p) {
      const PageState state = map->state(PageIndex{p});
      // All sweeps may have passed a page that was given back late: it is absent and was never filled.
      ASSERT_EQ(taken[p], state == PageState::kPresent || state == PageState::kZero ? 1 : 0) << p;
      ASSERT_NE(state, PageState::kClaimed);
    }
  }
}

}  // namespace
}  // namespace vmigrate::memory
