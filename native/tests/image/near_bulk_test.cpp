// Tests pages that nobody waits for, and that near holders bring before the root does.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/image/near_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::eventually;
using test::FakeNear;
using test::FetchHarness;
using test::kPage;
using test::waits;
using transport::Operation;
using wire::ImageCounter;

class NearBulkTest : public test::NearTest {};

TEST_F(NearBulkTest, AHolderThatHasEverythingLeavesNothingToTheRoot) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  sweep_to_the_end();
  EXPECT_EQ(from_root(), 0u);
  EXPECT_EQ(from_near(), kDataPages * kPage);
  EXPECT_FALSE(near.snapshot().is_connected);
  EXPECT_FALSE(near.snapshot().failure);
  EXPECT_TRUE(near.bulk->was_destroyed());
}

TEST_F(NearBulkTest, SeveralHoldersOfOneLevelAreReadTogether) {
  start();
  FakeNear one(host, 1), other(host, 2), far(host, 3, 1);
  for (FakeNear* near : {&one, &other, &far}) {
    near->have_all();
    ASSERT_TRUE(near->add().ok());
  }
  sweep_to_the_end();
  EXPECT_EQ(from_root(), 0u);
  EXPECT_GT(one.bulk_reads, kDataPages / 10);
  EXPECT_GT(other.bulk_reads, kDataPages / 10);
  EXPECT_EQ(far.bulk_reads, 0u) << "it is of a level that is not the nearest";
}

TEST_F(NearBulkTest, NothingIsReadBeforeTheSweep) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(near.looks + near.bulk_reads, 0u);
  sweep_to_the_end();
}

TEST_F(NearBulkTest, TheRootBringsWhatTheHolderNeverGets) {
  start();
  FakeNear near(host, 1);
  near.have([](uint64_t page) { return page < kPages / 2; });
  ASSERT_TRUE(near.add().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(eventually([&] { return from_near() == kDataPages / 2 * kPage; }));
  std::this_thread::sleep_for(300ms);
  EXPECT_EQ(from_root(), 0u) << "the holder may get more";
  sweep_to_the_end();
  EXPECT_EQ(from_root(), kDataPages / 2 * kPage);
  EXPECT_TRUE(near.is_honest);
}

TEST_F(NearBulkTest, PagesAreReadAsTheHolderGetsThem) {
  start();
  FakeNear near(host, 1);
  ASSERT_TRUE(near.add().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  for (uint64_t page = 0; page < kPages; page += 64) {
    near.have([&](uint64_t at) { return at >= page && at < page + 64; });
    std::this_thread::sleep_for(5ms);
  }
  sweep_to_the_end();
  EXPECT_EQ(from_root(), 0u);
}

TEST_F(NearBulkTest, RunsOfALostConnectionAreReadFromTheNextLevelAndThenFromTheRoot) {
  start();
  FakeNear parent(host, 1, 0), grandparent(host, 2, 1);
  parent.have_all();
  grandparent.have_all();
  ASSERT_TRUE(parent.add().ok());
  ASSERT_TRUE(grandparent.add().ok());
  for (FakeNear* near : {&parent, &grandparent})
    near->bulk->hold_if([=](const Operation& op) { return near->reads_pages(op); });
  ASSERT_TRUE(host.fetch->sweep().ok());
  auto& clone = host.add_clone();
  ASSERT_TRUE(eventually([&] { return parent.bulk->held_count() != 0; }));
  EXPECT_EQ(grandparent.bulk->held_count(), 0u);
  parent.bulk->disconnect();
  ASSERT_TRUE(eventually([&] { return grandparent.bulk->held_count() != 0; }));
  grandparent.bulk->disconnect();
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(from_root(), kDataPages * kPage);
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

/// A fault on a page that bulk has claimed there waits for no longer than the claim.
TEST_F(NearBulkTest, AFaultOnAClaimThatIsGivenBackIsServedAtOnce) {
  start();
  FakeNear near(host, 1);
  near.have([](uint64_t page) { return page == 8; });
  ASSERT_TRUE(near.add().ok());
  near.bulk->hold_if([&](const Operation& op) { return near.reads_pages(op); });
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(eventually([&] { return near.bulk->held_count() == 1; }));
  auto& clone = host.add_clone();
  auto reading = clone.read(8);
  EXPECT_TRUE(waits(reading, 100ms));
  host.fetch->remove_near(1);
  ASSERT_EQ(reading.wait_for(900ms), std::future_status::ready);
  EXPECT_EQ(reading.get(), host.expected(8));
  EXPECT_TRUE(host.fetch->nears().empty());
}

TEST_F(NearBulkTest, AHolderThatDoesNotAnswerCostsASecond) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  near.bulk->hold_all();
  const auto from = std::chrono::steady_clock::now();
  sweep_to_the_end();
  EXPECT_GE(std::chrono::steady_clock::now() - from, 900ms);
  EXPECT_TRUE(near.snapshot().failure);
  EXPECT_EQ(near.snapshot().failure->code, ErrorCode::kTimeout);
  EXPECT_EQ(from_root(), kDataPages * kPage);
}

TEST_F(NearBulkTest, ALostHolderIsReplaced) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  EXPECT_EQ(host.fetch->add_near(near.endpoints(), 1, 0).error().code, ErrorCode::kAlreadyExists);
  // Those endpoints are the newest that `near` controls, and are gone.
  EXPECT_TRUE(near.demand->was_destroyed());
  FakeNear first(host, 2);
  first.have_all();
  host.fetch->remove_near(1);
  ASSERT_TRUE(first.add().ok());
  first.demand->disconnect();
  EXPECT_TRUE(first.is_dropped(ErrorCode::kDisconnected));
  ASSERT_TRUE(first.add().ok());
  EXPECT_EQ(host.fetch->nears().size(), 1u);
  sweep_to_the_end();
  EXPECT_EQ(from_root(), 0u);
}

TEST_F(NearBulkTest, ReadsAllRegions) {
  FetchHarness two(FetchHarness::Specs{{600, is_data}, {1000, is_data}});
  two.finish_maps();
  two.start();
  ASSERT_TRUE(eventually([&] { return two.counter(ImageCounter::kPagesZero) == 400; }));
  FakeNear near(two, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  ASSERT_TRUE(two.fetch->sweep().ok());
  ASSERT_TRUE(two.reaches(ImageState::kComplete));
  EXPECT_EQ(two.counter(ImageCounter::kNearBytes), 1200 * kPage);
  EXPECT_EQ(two.bad_pages(two.add_clone()), 0u);
}

TEST_F(NearBulkTest, LooksForThePagesBehindAFault) {
  start();
  FakeNear near(host, 1);
  ASSERT_TRUE(near.add().ok());
  std::atomic<bool> is_followed{false};
  {
    const std::lock_guard lock(near.bulk->mutex);
    near.bulk->result = [&, before = near.bulk->result](const Operation& op) {
      if (op.remote_offset_bytes == 2001 && op.length_bytes == kNearFollowBytes / kPage) is_followed = true;
      return before(op);
    };
  }
  ASSERT_TRUE(host.fetch->sweep().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 2000), host.expected(2000));
  EXPECT_TRUE(eventually([&] { return is_followed.load(); }, 900ms)) << "the root's sweep follows";
}

TEST_F(NearBulkTest, TheBandwidthLimitCounts) {
  host.finish_maps();
  FetchOptions options;
  options.bandwidth_bytes_per_s = 16 << 20;
  auto opened = ImageFetch::open(
      {{{host.image_paths[0], host.presence_paths[0], host.lengths[0], kPage}}, options, false, {}, {}});
  ASSERT_TRUE(opened.ok());
  host.fetch = std::move(opened).value();
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  const auto from = std::chrono::steady_clock::now();
  sweep_to_the_end();
  // 12 MiB, less the burst and the last fetch, which is not waited for.
  EXPECT_GE(std::chrono::steady_clock::now() - from, 600ms);
  EXPECT_EQ(from_root(), 0u);
}

TEST_F(NearBulkTest, WhatIsPostedLaterComesLater) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  {
    const std::lock_guard lock(near.bulk->mutex);
    near.bulk->capacity = 1;  // would block again and again
  }
  {
    const std::lock_guard lock(near.demand->mutex);
    near.demand->capacity = 1;
  }
  auto& clone = host.add_clone();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t i = 0; i < 20; ++i) readings.push_back(clone.read(i * 4));
  sweep_to_the_end();
  for (auto& reading : readings) ASSERT_TRUE(arrives(reading));
  EXPECT_GT(from_near(), 0u);
  EXPECT_FALSE(near.snapshot().failure) << near.snapshot().failure->what;
}

TEST_F(NearBulkTest, AHolderOfOtherRegionsIsRefused) {
  start();
  FakeNear near(host, 1);
  auto endpoints = near.endpoints();
  endpoints.keys[0].presence.length_bytes -= 1;
  EXPECT_EQ(host.fetch->add_near(std::move(endpoints), 1, 0).error().code, ErrorCode::kProtocol);
  endpoints = near.endpoints();
  endpoints.keys[0].ram.length_bytes -= kPage;
  EXPECT_EQ(host.fetch->add_near(std::move(endpoints), 1, 0).error().code, ErrorCode::kProtocol);
  endpoints = near.endpoints();
  endpoints.keys.clear();
  EXPECT_EQ(host.fetch->add_near(std::move(endpoints), 1, 0).error().code, ErrorCode::kProtocol);
  std::vector<std::unique_ptr<FakeNear>> nears;
  for (uint32_t id = 0; id < kNearHoldersMax; ++id) {
    nears.push_back(std::make_unique<FakeNear>(host, id));
    ASSERT_TRUE(nears.back()->add().ok());
  }
  EXPECT_EQ(host.fetch->add_near(near.endpoints(), 100, 0).error().code, ErrorCode::kInvalidArgument);
  host.fetch->close();
  for (const auto& each : nears) EXPECT_TRUE(each->demand->was_destroyed() && each->bulk->was_destroyed());
  EXPECT_EQ(host.fetch->add_near(near.endpoints(), 1, 0).error().code, ErrorCode::kClosed);
}

TEST_F(NearBulkTest, ACompleteImageNeedsNone) {
  start();
  sweep_to_the_end();
  FakeNear near(host, 1);
  EXPECT_TRUE(near.add().ok());
  EXPECT_TRUE(host.fetch->nears().empty());
  EXPECT_TRUE(near.bulk->was_destroyed());
}

/// Added before the threads exist.
TEST_F(NearBulkTest, IsUsedFromTheStart) {
  host.finish_maps();
  host.open();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  std::this_thread::sleep_for(1100ms);  // its opening is long past
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  sweep_to_the_end();
  EXPECT_EQ(from_root(), 0u);
}

}  // namespace
}  // namespace vmigrate::pager
