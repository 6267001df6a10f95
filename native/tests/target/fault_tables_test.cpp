#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base/fault_stats.hpp"
#include "target/wait_table.hpp"

namespace vmigrate::pager {
namespace {

TEST(FaultStats, PercentilesAreWithinASixteenth) {
  FaultStats stats;
  stats.start(0);
  for (uint64_t wait = 1; wait <= 1000; ++wait) stats.record(0, wait * 1000);
  EXPECT_NEAR(static_cast<double>(stats.percentile_ns(500)), 500e3, 500e3 / 16);
  EXPECT_NEAR(static_cast<double>(stats.percentile_ns(990)), 990e3, 990e3 / 16);
  EXPECT_EQ(stats.max_ns(), 1'000'000u);
  EXPECT_EQ(stats.wait_ns(), 500'500'000u);
  FaultStats huge;
  huge.record(0, UINT64_MAX);
  EXPECT_EQ(huge.percentile_ns(500), UINT64_MAX);
  EXPECT_EQ(FaultStats().percentile_ns(500), 0u);
}

TEST(FaultStats, DegradedTimeEndsWithTheLastWindowThatWaitedMoreThanATenth) {
  constexpr uint64_t kMs = 1'000'000;
  FaultStats stats;
  stats.start(1000 * kMs);
  const auto wait = [&](uint64_t from_ms, uint64_t to_ms) {
    stats.record((1000 + from_ms) * kMs, (1000 + to_ms) * kMs);
  };
  wait(3, 4);
  EXPECT_EQ(stats.degraded_ns(), 0u) << "exactly a tenth is not more";
  wait(5, 6);
  EXPECT_EQ(stats.degraded_ns(), 10 * kMs) << "two waits of one window add up";
  wait(47, 50);
  EXPECT_EQ(stats.degraded_ns(), 50 * kMs);
  wait(105, 135);
  EXPECT_EQ(stats.degraded_ns(), 140 * kMs);
  wait(20, 29);
  EXPECT_EQ(stats.degraded_ns(), 140 * kMs) << "a straggler of an older window";
  wait(200, 3000);
  EXPECT_EQ(stats.degraded_ns(), 3000 * kMs);
}

TEST(WaitTable, EachWaitIsResolvedOnceAndOnlyInItsRange) {
  WaitTable waits;
  for (uint64_t page = 0; page < kWaitingFaultsMax; ++page) {
    ASSERT_TRUE(waits.insert(page_key(1, PageIndex{page}), page + 1));
  }
  EXPECT_FALSE(waits.insert(page_key(1, PageIndex{999}), 1)) << "full";
  EXPECT_EQ(waits.find(page_key(0, PageIndex{0}), page_key(1, PageIndex{0})), 0u);
  EXPECT_NE(waits.find(page_key(1, PageIndex{10}), page_key(1, PageIndex{11})), 0u);
  std::atomic<uint64_t> sum{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (uint64_t page = 0; page < kWaitingFaultsMax; ++page) {
        const PageKey key = page_key(1, PageIndex{page});
        waits.resolve(key, key + 1, [&](uint64_t read_ns) { sum += read_ns; });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(sum, kWaitingFaultsMax * (kWaitingFaultsMax + 1) / 2);
  EXPECT_EQ(waits.count(), 0u);
}

}  // namespace
}  // namespace vmigrate::pager
