// Tests the order of first touches: how clusters are numbered, recorded by many threads, and walked through.

#include "memory/touch_order.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <thread>

#include "tests/memory/page.hpp"

namespace vmigrate::memory {
namespace {

constexpr uint64_t kCluster = wire::kTouchClusterBytes;
constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kClusterPages = kCluster / kPage;

/// Regions of 10 clusters, of two and a half, and of one huge page.
Clusters some_clusters() {
  Clusters clusters;
  clusters.add_region(10 * kCluster, kPage);
  clusters.add_region(2 * kCluster + kCluster / 2, kPage);
  clusters.add_region(kHugePage, kHugePage);
  return clusters;
}

std::vector<uint32_t> shuffled(uint32_t count, uint32_t seed) {
  std::vector<uint32_t> numbers(count);
  for (uint32_t i = 0; i < count; ++i) numbers[i] = i;
  std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed));
  return numbers;
}

TEST(Clusters, AreNumberedThroughAllRegions) {
  const Clusters clusters = some_clusters();
  EXPECT_EQ(clusters.count(), 10u + 3u + kHugePage / kCluster);
  EXPECT_EQ(clusters.number(0, PageIndex{kClusterPages - 1}), 0u);
  EXPECT_EQ(clusters.number(1, PageIndex{kClusterPages}), 11u);
  EXPECT_EQ(clusters.number(2, PageIndex{0}), 13u);
  const auto last = clusters.place(12);
  ASSERT_TRUE(last.has_value());
  EXPECT_EQ(last->region_index, 1u);
  EXPECT_EQ(raw(last->pages.first), 2 * kClusterPages);
  EXPECT_EQ(last->pages.count, kClusterPages / 2) << "no further than the region";
  const auto huge = clusters.place(14);
  ASSERT_TRUE(huge.has_value());
  EXPECT_EQ(huge->region_index, 2u);
  EXPECT_EQ(raw(huge->pages.first), 0u);
  EXPECT_EQ(huge->pages.count, 1u);
  EXPECT_FALSE(clusters.place(clusters.count()).has_value());
  EXPECT_FALSE(clusters.place(UINT64_MAX).has_value());
}

TEST(TouchOrder, HasEachClusterOnceInTheOrderOfFirstTouches) {
  TouchOrder touched(some_clusters());
  EXPECT_TRUE(touched.clusters().empty());
  for (const uint64_t page : {40u, 3u, 41u, 0u, 159u}) touched.touch(0, PageIndex{page});
  touched.touch(2, PageIndex{0});
  touched.touch(1, PageIndex{0});
  touched.touch(2, PageIndex{0});
  EXPECT_EQ(touched.clusters(), (std::vector<uint32_t>{2, 0, 9, 13, 10}));
}

TEST(TouchOrder, EndsWhenItIsFull) {
  Clusters clusters;
  clusters.add_region((wire::kTouchClustersMax + 100) * kCluster, kPage);
  TouchOrder touched(clusters);
  for (uint64_t i = wire::kTouchClustersMax + 100; i-- > 0;) touched.touch(0, PageIndex{i * kClusterPages});
  const auto order = touched.clusters();
  ASSERT_EQ(order.size(), wire::kTouchClustersMax);
  EXPECT_EQ(order.front(), wire::kTouchClustersMax + 99);
  EXPECT_EQ(order.back(), 100u);
}

/// The threads touch the same clusters at about the same time, so that they meet at one bit.
TEST(TouchOrder, ManyThreadsRecordWhileOneReads) {
  constexpr uint32_t kCount = 4'000;
  constexpr int kThreads = 3;
  Clusters clusters;
  clusters.add_region(kCount * kCluster, kPage);
  for (uint32_t round = 0; round < 50; ++round) {
    TouchOrder touched(clusters);
    const auto numbers = shuffled(kCount, round);
    std::atomic<int> waiting{kThreads}, running{kThreads};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&] {
        --waiting;
        while (waiting != 0) std::this_thread::yield();
        for (const uint32_t number : numbers) touched.touch(0, PageIndex{number * kClusterPages});
        --running;
      });
    }
    std::vector<uint32_t> before;
    bool is_prefix = true;
    while (running != 0) {
      const auto now = touched.clusters();
      is_prefix &= now.size() >= before.size() && std::equal(before.begin(), before.end(), now.begin());
      before = now;
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_TRUE(is_prefix) << "what was read once stays";
    const auto order = touched.clusters();
    ASSERT_EQ(order.size(), kCount);
    ASSERT_EQ(std::set<uint32_t>(order.begin(), order.end()).size(), kCount);
  }
}

TEST(OrderedPages, NeighboursComeTogetherAndWhatDoesNotExistIsPassedOver) {
  OrderedPages order(some_clusters(), {7, 4, 5, 99, UINT32_MAX, 6, 9, 10, 13, 14, 4});
  const auto expect = [&](uint64_t bytes_max, uint32_t region, uint64_t first, uint64_t count) {
    const auto next = order.next(bytes_max);
    ASSERT_TRUE(next.has_value());
    EXPECT_EQ(next->region_index, region);
    EXPECT_EQ(raw(next->pages.first), first);
    EXPECT_EQ(next->pages.count, count);
  };
  expect(kCluster, 0, 7 * kClusterPages, kClusterPages);
  expect(8 * kCluster, 0, 4 * kClusterPages, 2 * kClusterPages);
  expect(kPage, 0, 6 * kClusterPages, kClusterPages);
  expect(8 * kCluster, 0, 9 * kClusterPages, kClusterPages);  // the next one is of another region
  expect(8 * kCluster, 1, 0, kClusterPages);
  expect(8 * kHugePage, 2, 0, 1);
  expect(8 * kHugePage, 2, 0, 1);  // the same page: whoever takes it finds it taken
  expect(8 * kCluster, 0, 4 * kClusterPages, kClusterPages);
  EXPECT_FALSE(order.next(kCluster).has_value());
  EXPECT_FALSE(OrderedPages().next(kCluster).has_value());
}

}  // namespace
}  // namespace vmigrate::memory
