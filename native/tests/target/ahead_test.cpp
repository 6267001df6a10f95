// Pages that are fetched while the VM still runs on the source, and taken back if it writes to them.

#include <gtest/gtest.h>

#include <filesystem>

#include "memory/region.hpp"
#include "target/target.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::kPage;
using test::PagerHarness;
using wire::TargetCounter;

constexpr uint64_t kPages = 600;

class Ahead : public ::testing::Test {
 protected:
  Ahead() : vm(PagerHarness::Specs{{kPages, [](uint64_t page) { return page % 4 != 0; }}, {9}}) {}

  void connect(const TargetOptions& options = {}) {
    vm.map_vm();
    vm.finish_maps();
    vm.open(false, options);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  }
  void fetch_all() {
    ASSERT_TRUE(vm.session->fetch_ahead().ok());
    ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  }
  void finish() {
    ASSERT_TRUE(vm.session->serve_demand().ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(vm.reaches(TargetState::kComplete));
    EXPECT_EQ(vm.bad_pages(), 0u);
  }
  /// Both regions, so that each map has the round's number.
  void rewrite(const std::vector<uint64_t>& pages, uint32_t round) {
    vm.rewrite(0, pages, round);
    vm.rewrite(1, {}, round);
  }

  PagerHarness vm;
};

TEST_F(Ahead, FetchesEverythingAndShowsNothing) {
  connect();
  auto reading = vm.touch(0, 1);
  fetch_all();
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent) + vm.counter(TargetCounter::kPagesZero), kPages + 9);
  EXPECT_EQ(vm.counter(TargetCounter::kPushBytes), (kPages / 4 * 3 + 9) * kPage);
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes), 0u);
  EXPECT_TRUE(PagerHarness::waits(reading)) << "a page that was mapped could not be taken back";
  finish();
  EXPECT_EQ(reading.get(), vm.expected(0, 1));
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes) + vm.counter(TargetCounter::kDemandBytes), 0u);
}

TEST_F(Ahead, PagesThatWereWrittenAreFetchedAgain) {
  connect();
  fetch_all();
  // Data, a hole, a run over the border of a byte, the last page.
  rewrite({1, 4, 14, 15, 16, 17, kPages - 1}, 1);
  const auto taken = vm.session->take_back(1);
  ASSERT_TRUE(taken.ok()) << taken.error().what;
  EXPECT_EQ(taken.value(), 7u);
  EXPECT_EQ(vm.session->take_back(1).value(), 0u) << "again, for a caller who has lost the answer";
  fetch_all();
  rewrite({2, 4, 5}, 2);
  vm.rewrite(1, {8}, 2);
  EXPECT_EQ(vm.session->take_back(2).value(), 4u);
  auto reading = vm.touch(0, 4);
  EXPECT_TRUE(PagerHarness::waits(reading));
  finish();
  EXPECT_EQ(reading.get(), vm.expected(0, 4));
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes) + vm.counter(TargetCounter::kDemandBytes), 4 * kPage);
}

TEST_F(Ahead, ATargetThatHasAllPagesButThoseTakenBackServesTheLoadOfTheDevices) {
  connect();
  fetch_all();
  rewrite({7}, 1);
  ASSERT_TRUE(vm.session->take_back(1).ok());
  ASSERT_TRUE(vm.session->serve_demand().ok());
  for (const uint64_t page : {6, 7, 8}) {
    auto reading = vm.touch(0, page);
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), vm.expected(0, page));
  }
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), kPage);
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST_F(Ahead, WhatIsHereIsMappedWhileTheRestComes) {
  connect();
  fetch_all();
  rewrite({7}, 1);
  ASSERT_TRUE(vm.session->take_back(1).ok());
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->serve_demand().ok());
  ASSERT_TRUE(vm.session->start().ok());
  // The last pages are mapped last.
  uint64_t page = kPages;
  ASSERT_TRUE(test::eventually([&] {
    page -= 4;
    const uint64_t faults = vm.counter(TargetCounter::kFaultCount);
    auto reading = vm.touch(0, page + 1);
    EXPECT_EQ(reading.get(), vm.expected(0, page + 1));
    return vm.counter(TargetCounter::kFaultCount) == faults;
  }));
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST_F(Ahead, AMapThatIsNotOfTheRoundChangesNothing) {
  connect();
  fetch_all();
  rewrite({1}, 3);
  EXPECT_EQ(vm.session->take_back(2).error().code, ErrorCode::kProtocol);
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent) + vm.counter(TargetCounter::kPagesZero), kPages + 9);
  vm.regions[0].dirty->begin();
  EXPECT_EQ(vm.session->take_back(3).error().code, ErrorCode::kProtocol) << "it is not final";
  vm.regions[0].dirty->set({PageIndex{1}, 2});
  vm.regions[0].dirty->finish(1, 3);
  EXPECT_EQ(vm.session->take_back(3).error().code, ErrorCode::kProtocol) << "its bits do not add up";
}

TEST_F(Ahead, OrderOfCalls) {
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  EXPECT_EQ(vm.session->fetch_ahead().error().code, ErrorCode::kInvalidArgument) << "before connect";
  EXPECT_EQ(vm.session->take_back(1).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  rewrite({1}, 1);
  EXPECT_EQ(vm.session->take_back(1).error().code, ErrorCode::kInvalidArgument) << "before any page is here";
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  EXPECT_EQ(vm.session->state(), TargetState::kAhead);
  EXPECT_TRUE(vm.session->fetch_ahead().ok()) << "it is under way";
  EXPECT_EQ(vm.session->take_back(1).error().code, ErrorCode::kInvalidArgument) << "while pages come";
  EXPECT_FALSE(vm.session->serve_demand().ok());
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  finish();
  EXPECT_FALSE(vm.session->fetch_ahead().ok());
  EXPECT_FALSE(vm.session->take_back(1).ok());
}

/// Fetches the first pages, and waits until nothing else is in flight.
TEST_F(Ahead, IsHeldWhenWhatIsInFlightHasCome) {
  TargetOptions options;
  options.bandwidth_bytes_per_s = 64 * kPage;
  connect(options);
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPushBytes) != 0; }));
  ASSERT_TRUE(vm.session->hold_ahead().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  const uint64_t present = vm.counter(TargetCounter::kPagesPresent);
  ASSERT_LT(present + vm.counter(TargetCounter::kPagesZero), kPages + 9) << "it must not be done";
  ASSERT_GT(present, 1u);
  // One page is here, a hole, and one that was never fetched.
  rewrite({1, 4, kPages - 1}, 1);
  EXPECT_EQ(vm.session->take_back(1).value(), 2u);
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent), present - 1);
  finish();
}

TEST_F(Ahead, IsNotHeldWhileAnythingIsInFlightAndGoesOn) {
  connect();
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(vm.session->hold_ahead().ok());
  EXPECT_FALSE(test::eventually([&] { return vm.session->state() == TargetState::kIdle; },
                                std::chrono::milliseconds(50)));
  EXPECT_EQ(vm.session->take_back(1).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(vm.session->fetch_ahead().ok()) << "it is held no more";
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent) + vm.counter(TargetCounter::kPagesZero), kPages + 9);
  ASSERT_TRUE(vm.session->hold_ahead().ok()) << "nothing is under way";
  rewrite({1}, 1);
  EXPECT_EQ(vm.session->take_back(1).value(), 1u);
  fetch_all();
  finish();
}

/// A map of holes that is read after the page was written would turn it into a zero page.
TEST_F(Ahead, IsNotHeldBeforeTheHolesAreKnown) {
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(vm.session->hold_ahead().ok());
  EXPECT_FALSE(test::eventually([&] { return vm.session->state() == TargetState::kIdle; },
                                std::chrono::milliseconds(50)));
  vm.finish_maps();
  ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  rewrite({4}, 1);
  EXPECT_EQ(vm.session->take_back(1).value(), 1u);
  finish();
}

TEST_F(Ahead, ALostConnectionIsReplacedByAnother) {
  connect();
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  vm.bulk->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  EXPECT_FALSE(vm.session->take_back(1).ok());
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  EXPECT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kIdle));
  finish();
}

TEST_F(Ahead, CloseEndsItWithoutAConnection) {
  connect();
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  vm.bulk->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kClosed);
}

TEST_F(Ahead, CloseEndsItAndItsWrites) {
  connect();
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.bulk->held_count() != 0; }));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kClosed);
  EXPECT_TRUE(vm.bulk->was_destroyed());
}

TEST_F(Ahead, AWrongSourceFailsIt) {
  connect();
  vm.bulk->fail_with(transport::OpResult::kBadKey);
  ASSERT_TRUE(vm.session->fetch_ahead().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  EXPECT_EQ(vm.session->failure()->code, ErrorCode::kProtocol);
}

/// The daemon dies after the commit. At the source the page had become a hole before the stop: what was
/// fetched ahead must not come back in its place.
TEST_F(Ahead, OldBytesDoNotBecomeZeroPagesAfterARestart) {
  connect();
  fetch_all();
  rewrite({1}, 1);
  ASSERT_TRUE(vm.session->take_back(1).ok());
  vm.session->close();
  vm.session.reset();
  auto source =
      memory::Region::open(vm.regions[0].source_path, kPages * kPage, kPage, memory::Mode::kReadWrite);
  ASSERT_TRUE(source.value()->punch({PageIndex{1}, 1}).ok());
  vm.regions[0].data[1] = false;
  vm.regions[0].map->begin();
  vm.regions[1].map->begin();
  vm.finish_maps();
  TargetOptions options;
  options.has_fetched_ahead = true;
  vm.open(/*resume=*/true, options);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

}  // namespace
}  // namespace vmigrate::pager
