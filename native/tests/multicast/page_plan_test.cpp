// Tests the order in which pages are sent.

#include "multicast/page_plan.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "tests/multicast/harness.hpp"

namespace vmigrate::multicast {
namespace {

using test::kPage;
using test::SentFiles;

struct Plan {
  explicit Plan(const SentFiles::Specs& specs, std::vector<uint32_t> order = {}) : files(specs) {
    for (const auto& file : files.files) {
      auto region = memory::Region::open(file.path, file.length_bytes, kPage, memory::Mode::kReadOnly);
      EXPECT_TRUE(region.ok());
      regions.push_back(std::move(region).value());
    }
    auto made = PagePlan::of(regions, std::move(order));
    EXPECT_TRUE(made.ok());
    plan = std::move(made).value();
  }
  SentFiles files;
  std::vector<std::unique_ptr<memory::Region>> regions;
  PagePlan plan;
};

TEST(PagePlan, TakesEachPageWithDataOnceAndUpwards) {
  Plan all(SentFiles::Specs{
      {1000, [](uint64_t page) { return page % 7 != 3; }}, {70}, {64, [](uint64_t) { return false; }}, {1}});
  EXPECT_EQ(all.plan.page_count(), all.files.data_pages);
  std::map<pager::PageKey, int> taken;
  pager::PageKey last = 0;
  while (const auto piece = all.plan.next(5)) {
    EXPECT_LE(piece->run.count, 5u);
    for (uint64_t page = raw(piece->run.first); page < raw(piece->run.first) + piece->run.count; ++page) {
      const pager::PageKey key = pager::page_key(piece->region_index, PageIndex{page});
      EXPECT_GT(key, last);
      last = key;
      EXPECT_TRUE(all.files.data[piece->region_index][page]);
      EXPECT_EQ(++taken[key], 1);
    }
  }
  EXPECT_EQ(taken.size(), all.files.data_pages);
  EXPECT_TRUE(all.plan.is_done());
  EXPECT_FALSE(all.plan.next(1).has_value());
}

TEST(PagePlan, WantedPagesComeFirst) {
  Plan all(SentFiles::Specs{{2000, [](uint64_t page) { return page != 1605; }}, {100}});
  (void)all.plan.next(10);
  all.plan.want(0, PageIndex{1607});
  all.plan.want(0, PageIndex{1600});  // of the same cluster
  all.plan.want(1, PageIndex{99});    // the last cluster is short
  all.plan.want(0, PageIndex{5});     // 10 to 15 are left of this one
  auto piece = all.plan.next(100);
  EXPECT_EQ(raw(piece->run.first), 1600u);
  EXPECT_EQ(piece->run.count, 5u) << "up to the hole";
  piece = all.plan.next(100);
  EXPECT_EQ(raw(piece->run.first), 1606u);
  EXPECT_EQ(piece->run.count, 10u);
  piece = all.plan.next(100);
  EXPECT_EQ(piece->region_index, 1u);
  EXPECT_EQ(raw(piece->run.first), 96u);
  EXPECT_EQ(piece->run.count, 4u);
  piece = all.plan.next(100);
  EXPECT_EQ(raw(piece->run.first), 10u);
  EXPECT_EQ(piece->run.count, 6u);
  piece = all.plan.next(4);
  EXPECT_EQ(raw(piece->run.first), 16u) << "the sweep goes on";
}

TEST(PagePlan, TouchedPagesComeAfterTheWantedOnesAndBeforeTheOthers) {
  // The first region has 7 clusters, so the second one begins at 7.
  Plan all(SentFiles::Specs{{100, [](uint64_t page) { return page != 50; }}, {40}}, {8, 3, 77, 4, 3, 8});
  all.plan.want(0, PageIndex{96});
  const auto expect = [&](uint64_t count_max, uint32_t region, uint64_t first, uint64_t count) {
    const auto piece = all.plan.next(count_max);
    ASSERT_TRUE(piece.has_value());
    EXPECT_EQ(piece->region_index, region);
    EXPECT_EQ(raw(piece->run.first), first);
    EXPECT_EQ(piece->run.count, count);
  };
  expect(10, 0, 96, 4);
  expect(10, 1, 16, 10);
  all.plan.want(1, PageIndex{0});
  expect(100, 1, 0, 16);
  expect(10, 1, 26, 6);
  expect(100, 0, 48, 2);  // up to the hole
  expect(100, 0, 51, 13);
  expect(100, 0, 64, 16);
  expect(100, 0, 0, 48);
  expect(100, 0, 80, 16);
  expect(100, 1, 32, 8);
  EXPECT_TRUE(all.plan.is_done());
}

TEST(PagePlan, IgnoresWhatDoesNotExist) {
  Plan all(SentFiles::Specs{{20}});
  all.plan.want(1, PageIndex{0});
  all.plan.want(0xffff, PageIndex{0});
  all.plan.want(0, PageIndex{20});
  all.plan.want(0, PageIndex{(uint64_t{1} << 48) - 1});
  EXPECT_EQ(raw(all.plan.next(1)->run.first), 0u);
}

TEST(PagePlan, SurvivesAnyWishes) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    Plan all(SentFiles::Specs{{3000, [&](uint64_t) { return random() % 3 != 0; }}, {40}});
    uint64_t taken = 0;
    while (!all.plan.is_done()) {
      for (uint32_t i = random() % 400; i > 0; --i)
        all.plan.want(static_cast<uint32_t>(random() % 3), PageIndex{random() % 3100});
      const auto piece = all.plan.next(1 + random() % 20);
      ASSERT_TRUE(piece.has_value());
      taken += piece->run.count;
    }
    EXPECT_EQ(taken, all.files.data_pages);
  }
}

}  // namespace
}  // namespace vmigrate::multicast
