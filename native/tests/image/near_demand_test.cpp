// Tests pages that clones wait for, and that near holders are asked for before the root.

#include <gtest/gtest.h>

#include <thread>

#include "tests/image/near_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::eventually;
using test::FakeNear;
using test::kPage;
using test::waits;
using transport::Operation;
using wire::ImageCounter;
using wire::PageState;

class NearDemandTest : public test::NearTest {};

TEST_F(NearDemandTest, APageThatItHasIsReadThereAndNotFromTheRoot) {
  start();
  FakeNear near(host, 7);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  auto& clone = host.add_clone();
  for (uint64_t page : {0, 1, 2, 100, 4000}) EXPECT_EQ(*clone.word(0, page), host.expected(page));
  EXPECT_EQ(from_root(), 0u);
  EXPECT_EQ(from_near(), 5 * kPage);
  EXPECT_EQ(near.snapshot().bytes, 5 * kPage);
  EXPECT_TRUE(near.snapshot().is_connected);
  EXPECT_EQ(near.looks, 0u) << "its thread looks itself";
}

TEST_F(NearDemandTest, AMissGoesUpOneLevelAfterTheOther) {
  start();
  FakeNear parent(host, 1, 0), grandparent(host, 2, 3);
  parent.have([](uint64_t page) { return page < 1000; });
  grandparent.have([](uint64_t page) { return page < 2000; });
  ASSERT_TRUE(grandparent.add().ok());
  ASSERT_TRUE(parent.add().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 500), host.expected(500));
  EXPECT_EQ(*clone.word(0, 1500), host.expected(1500));
  EXPECT_EQ(*clone.word(0, 2500), host.expected(2500));
  EXPECT_EQ(parent.snapshot().bytes, kPage);
  EXPECT_EQ(grandparent.snapshot().bytes, kPage);
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), kPage);
  EXPECT_EQ(host.counter(ImageCounter::kAbsentAnswers), 3u);
}

/// Until then a page that is absent may become zero, and what another host has written into it would be seen.
TEST_F(NearDemandTest, TheRootAloneIsAskedUntilItsDataMapIsKnown) {
  host.start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  ASSERT_TRUE(host.fetch->sweep().ok());
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(from_near(), 0u);
  host.finish_maps();
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(from_near(), (kDataPages - 1) * kPage);
}

TEST_F(NearDemandTest, SeveralOfOneLevelShareThePages) {
  start();
  std::vector<std::unique_ptr<FakeNear>> nears;
  for (uint32_t id = 0; id < 4; ++id) {
    nears.push_back(std::make_unique<FakeNear>(host, id));
    nears.back()->have_all();
    ASSERT_TRUE(nears.back()->add().ok());
  }
  auto& clone = host.add_clone();
  for (uint64_t page = 0; page < kPages; page += 16) EXPECT_EQ(*clone.word(0, page), host.expected(page));
  EXPECT_EQ(from_root(), 0u);
  for (const auto& near : nears) EXPECT_GT(near->demand_reads, kPages / 16 / 8) << near->id;
}

TEST_F(NearDemandTest, ADeviceIsAskedForTheStateFirst) {
  start();
  FakeNear near(host, 1, 0, FakeNear::Kind::kDevice);
  near.have([](uint64_t page) { return page < 100; });
  near.set(200, PageState::kClaimed);
  ASSERT_TRUE(near.add().ok());
  near.demand->hold_if([&](const Operation& op) { return !near.reads_pages(op); });
  auto& clone = host.add_clone();
  auto reading = clone.read(8);
  ASSERT_TRUE(eventually([&] { return near.demand->held_count() == 1; }));
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(near.demand_reads, 0u) << "the state has not been seen";
  near.demand->release_all();
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(8));
  EXPECT_EQ(near.demand_reads, 1u);
  EXPECT_EQ(*clone.word(0, 200), host.expected(200));
  EXPECT_EQ(*clone.word(0, 300), host.expected(300));
  EXPECT_EQ(near.demand_reads, 1u) << "what is not there is not read";
  EXPECT_EQ(near.looks, 3u);
  EXPECT_EQ(host.counter(ImageCounter::kAbsentAnswers), 2u);
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 2 * kPage);
}

TEST_F(NearDemandTest, ClaimsOfALostConnectionGoUp) {
  start();
  for (const auto kind : {FakeNear::Kind::kThread, FakeNear::Kind::kDevice}) {
    const uint64_t from = kind == FakeNear::Kind::kThread ? 0 : 1024;
    FakeNear parent(host, 1, 0, kind), grandparent(host, 2, 1);
    parent.have_all();
    grandparent.have([&](uint64_t page) { return page < from + 512; });
    ASSERT_TRUE(parent.add().ok());
    ASSERT_TRUE(grandparent.add().ok());
    parent.demand->hold_all();
    auto& clone = host.add_clone();
    std::vector<std::future<uint64_t>> readings;
    std::vector<uint64_t> pages;
    for (uint64_t i = 0; i < 32; ++i) pages.push_back(from + i * 32);
    for (const uint64_t page : pages) readings.push_back(clone.read(page));
    ASSERT_TRUE(eventually([&] { return parent.demand->held_count() == pages.size(); }));
    EXPECT_TRUE(waits(readings[0]));
    parent.demand->disconnect();
    for (size_t i = 0; i < pages.size(); ++i) {
      ASSERT_TRUE(arrives(readings[i]));
      EXPECT_EQ(readings[i].get(), host.expected(pages[i]));
    }
    EXPECT_TRUE(parent.is_dropped(ErrorCode::kDisconnected));
    EXPECT_TRUE(parent.demand->was_destroyed());
    EXPECT_TRUE(eventually([&] { return parent.bulk->was_destroyed(); }));
    EXPECT_EQ(grandparent.snapshot().bytes, 16 * kPage);
    host.fetch->remove_near(1);
    host.fetch->remove_near(2);
    ASSERT_TRUE(eventually([&] { return grandparent.demand->was_destroyed(); }));
  }
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 32 * kPage);
}

TEST_F(NearDemandTest, AHolderThatDoesNotAnswerCostsASecond) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  near.demand->hold_all();
  auto& clone = host.add_clone();
  auto reading = clone.read(8);
  EXPECT_TRUE(waits(reading, 500ms));
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(8));
  EXPECT_TRUE(near.is_dropped(ErrorCode::kTimeout));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), kPage);
}

/// A claim that cannot be served there moves to the root's lane, which has room for so many.
TEST_F(NearDemandTest, NoMoreIsClaimedThanTheRootsLaneCanTake) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  near.demand->hold_all();
  auto& clone = host.add_clone();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t i = 0; i < kDemandFetchesMax + 6; ++i) readings.push_back(clone.read(i * 4));
  ASSERT_TRUE(eventually([&] { return near.demand->held_count() == kDemandFetchesMax; }));
  ASSERT_TRUE(eventually([&] { return host.counter(ImageCounter::kCloneFaultCount) == readings.size(); }));
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(near.demand->held_count(), kDemandFetchesMax);
  near.demand->disconnect();
  for (size_t i = 0; i < readings.size(); ++i) {
    ASSERT_TRUE(arrives(readings[i]));
    EXPECT_EQ(readings[i].get(), host.expected(i * 4));
  }
}

TEST_F(NearDemandTest, GoesOnWhileTheRootIsLost) {
  start();
  FakeNear near(host, 1);
  near.have([](uint64_t page) { return page < 1000; });
  ASSERT_TRUE(near.add().ok());
  host.demand->disconnect();
  ASSERT_TRUE(host.reaches(ImageState::kDisconnected));
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  auto reading = clone.read(2000);
  EXPECT_TRUE(waits(reading));
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(2000));
}

}  // namespace
}  // namespace vmigrate::pager
