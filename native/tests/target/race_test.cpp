// Makes races deterministic: park a thread at an injection point, provoke the other side, release the thread,
// check bytes.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <thread>

#include "base/page_key.hpp"
#include "target/limits.hpp"
#include "target/target.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::kPage;
using test::PagerHarness;
using test::Parking;
using wire::InjectPoint;
using wire::TargetCounter;

PageKey page0(uint64_t page) {
  return page_key(0, PageIndex{page});
}

TEST(Race, FaultOnAPageThatPrefetchHasClaimed) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{32}});
  parking.arm(InjectPoint::kTargetPrefetchClaimed);
  vm.start();
  ASSERT_TRUE(parking.wait_parked());
  // Claimed by bulk, but not posted yet.
  auto reading = vm.touch(0, 7);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kFaultOnClaimedCount) == 1; }));
  EXPECT_TRUE(PagerHarness::waits(reading));
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), 0u);
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 7));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), 0u) << "fetched once";
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(Race, FaultBetweenArrivalAndPublish) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{32}});
  parking.arm(InjectPoint::kTargetBeforePublish);
  vm.start();
  ASSERT_TRUE(parking.wait_parked());
  // The page is in the page cache already, so the fault is a minor one. It is not published, so the fault
  // must wait.
  auto first = vm.touch(0, 0);
  auto last = vm.touch(0, 31);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kFaultOnClaimedCount) == 2; }));
  EXPECT_TRUE(PagerHarness::waits(first));
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(first));
  ASSERT_TRUE(PagerHarness::arrives(last));
  EXPECT_EQ(first.get(), vm.expected(0, 0));
  EXPECT_EQ(last.get(), vm.expected(0, 31));
}

// The demand thread holds the fault while bulk claims, fetches, publishes, continues and wakes.
TEST(Race, PageArrivesWhileItsFaultIsBeingLookedAt) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{8}, {8}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.bulk->hold_all();
  parking.arm(InjectPoint::kTargetFaultRead, page0(5));
  ASSERT_TRUE(vm.session->start().ok());
  auto reading = vm.touch(0, 5);
  ASSERT_TRUE(parking.wait_parked());
  vm.bulk->release_all();
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesPresent) == 16; }));
  EXPECT_NE(vm.session->state(), TargetState::kComplete) << "a fault is still in hand";
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 5));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(Race, DemandOvertakesPrefetch) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{512}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  // The map may be read, the first prefetch run hangs, and the second is not posted.
  vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.length_bytes == 512 * kPage; });
  parking.arm(InjectPoint::kTargetPrefetchClaimed, page0(kChunkBytesBusy / kPage));
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(parking.wait_parked());
  EXPECT_EQ(vm.bulk->held_count(), 1u);
  auto reading = vm.touch(0, 0);
  EXPECT_TRUE(PagerHarness::waits(reading)) << "page 0 is in the hanging run";
  // Nothing has claimed the last page: the demand connection brings it at once.
  auto ahead = vm.touch(0, 511);
  ASSERT_TRUE(PagerHarness::arrives(ahead));
  EXPECT_EQ(ahead.get(), vm.expected(0, 511));
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), kPage);
  parking.release();
  EXPECT_TRUE(PagerHarness::waits(reading, 10ms));
  vm.bulk->release_all();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 0));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(Race, PrefetchNeverOverwritesWhatTheGuestWroteAfterDemand) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.start(false);
  auto reading = vm.touch(0, 9);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  auto* word = reinterpret_cast<volatile uint64_t*>(vm.regions[0].base + 9 * kPage);
  *word = 0x1234;
  vm.finish_maps();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(*word, 0x1234u);
}

TEST(Race, FaultOnAZeroPageAndAWriteToIt) {
  PagerHarness vm(PagerHarness::Specs{{64, [](uint64_t page) { return page >= 32; }}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.length_bytes == 64 * kPage; });
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 32; }));
  auto reading = vm.touch(0, 4);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  *reinterpret_cast<volatile uint64_t*>(vm.regions[0].base + 4 * kPage) = 77;
  // Its neighbours were mapped with it; a page further on is mapped by its own fault.
  auto far = vm.touch(0, 31);
  ASSERT_TRUE(PagerHarness::arrives(far));
  EXPECT_EQ(far.get(), 0u);
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), 0u);
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(*reinterpret_cast<volatile uint64_t*>(vm.regions[0].base + 4 * kPage), 77u);
}

// A page turns out to be a hole between the check of its state and the claim.
TEST(Race, PageIsMarkedZeroWhileItsFaultIsBeingLookedAt) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{16, [](uint64_t) { return false; }}});
  parking.arm(InjectPoint::kTargetFaultRead, page0(3));
  vm.start(false);
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(parking.wait_parked());
  vm.finish_maps();
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 16; }));
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
}

// The reverse: a fault claims the page before the map says that it is a hole.
TEST(Race, HoleThatWasClaimedByAFaultIsFetchedAsZeros) {
  PagerHarness vm(PagerHarness::Specs{{16, [](uint64_t) { return false; }}});
  vm.start(false);
  vm.demand->hold_all();
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(test::eventually([&] { return vm.demand->held_count() == 1; }));
  vm.finish_maps();
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 15; }));
  EXPECT_NE(vm.session->state(), TargetState::kComplete);
  vm.demand->release_all();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent), 1u);
}

// The guest's balloon gives a page back while it is being fetched, and again after it is present.
TEST(Race, HolePunchedUnderAPageReadsAsZerosNotForEver) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{16}, {1}});
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  parking.arm(InjectPoint::kTargetBeforePublish, page0(6));
  ASSERT_TRUE(vm.session->start().ok());
  auto reading = vm.touch(0, 6);
  ASSERT_TRUE(parking.wait_parked());
  const UniqueFd fd(::open(vm.regions[0].target_path.c_str(), O_RDWR | O_CLOEXEC));
  const auto punch = [&] {
    ASSERT_EQ(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 6 * kPage, kPage), 0);
  };
  punch();
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  punch();
  auto again = vm.touch(0, 6);
  ASSERT_TRUE(PagerHarness::arrives(again));
  EXPECT_EQ(again.get(), 0u);
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
}

TEST(Race, TargetFileThatShrinksFailsTheSession) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.start(false);
  auto reading = vm.touch(0, 2);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  ASSERT_EQ(::truncate(vm.regions[0].target_path.c_str(), 4 * kPage), 0);
  // pwrite would grow the file again, so the transport reports a broken target as an error.
  vm.demand->fail_with(transport::OpResult::kIoError);
  // The waiter must not be woken here: the vCPU would get SIGBUS, as it would without us. Prefetch notices
  // the error instead.
  vm.bulk->fail_with(transport::OpResult::kIoError);
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
}

TEST(Race, SourceRegionThatShrinksFailsTheSessionAndTheFaultWaits) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.start(false);
  ASSERT_EQ(::ftruncate(vm.regions[0].source_fd.get(), 8 * kPage), 0);
  auto good = vm.touch(0, 3);
  ASSERT_TRUE(PagerHarness::arrives(good));
  EXPECT_EQ(good.get(), vm.expected(0, 3));
  auto lost = vm.touch(0, 40);
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  EXPECT_EQ(vm.session->failure()->code, ErrorCode::kRegionChanged);
  EXPECT_TRUE(PagerHarness::waits(lost)) << "never zeros in place of bytes that are lost";
  // The owner grows the file again with its bytes, and a new session answers the fault.
  vm.session.reset();
  for (uint64_t page = 8; page < 64; ++page) test::write_pattern(vm.regions[0].source_fd.get(), 1, page);
  vm.finish_maps();
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(PagerHarness::arrives(lost));
  EXPECT_EQ(lost.get(), vm.expected(0, 40));
}

TEST(Race, CloseDuringAFaultLeavesTheVcpuWaitingAndTheNextSessionAnswers) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.start(false);
  vm.demand->hold_all();
  auto fetched = vm.touch(0, 11);
  ASSERT_TRUE(test::eventually([&] { return vm.demand->held_count() == 1; }));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kClosed);
  EXPECT_TRUE(vm.demand->was_destroyed());
  auto later = vm.touch(0, 12);
  EXPECT_TRUE(PagerHarness::waits(fetched));
  EXPECT_TRUE(PagerHarness::waits(later));
  vm.session.reset();
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(PagerHarness::arrives(fetched));
  ASSERT_TRUE(PagerHarness::arrives(later));
  EXPECT_EQ(fetched.get(), vm.expected(0, 11));
  EXPECT_EQ(later.get(), vm.expected(0, 12));
  vm.finish_maps();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(Race, CloseWhileAFaultIsParkedAtEachPoint) {
  for (const InjectPoint point : {InjectPoint::kTargetFaultRead, InjectPoint::kTargetClaimed,
                                  InjectPoint::kTargetBeforePost, InjectPoint::kTargetBeforePublish}) {
    Parking parking;
    PagerHarness vm(PagerHarness::Specs{{16}});
    parking.arm(point, page0(5));
    vm.start(false);
    auto reading = vm.touch(0, 5);
    ASSERT_TRUE(parking.wait_parked());
    auto closing = std::async(std::launch::async, [&] { vm.session->close(); });
    EXPECT_EQ(closing.wait_for(20ms), std::future_status::timeout) << "close waits for the thread";
    parking.release();
    ASSERT_EQ(closing.wait_for(test::kPatience), std::future_status::ready);
    // Whatever the old session had reached, a new session completes it.
    vm.session.reset();
    vm.finish_maps();
    vm.open(true);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), vm.expected(0, 5));
    ASSERT_TRUE(vm.reaches(TargetState::kComplete));
    EXPECT_EQ(vm.bad_pages(), 0u);
  }
}

class RaceReconnect : public ::testing::TestWithParam<bool> {};

TEST_P(RaceReconnect, OperationsInFlightArePostedAgainWithTheNewKeys) {
  const bool cut_demand = GetParam();
  PagerHarness vm(PagerHarness::Specs{{256, [](uint64_t page) { return page % 5 != 0; }}, {64}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.demand->hold_all();
  vm.bulk->hold_if([](const transport::Operation& op) {
    return op.remote.length_bytes == 256 * kPage || op.remote.length_bytes == 64 * kPage;
  });
  // Demand claims its page before bulk can, because the page is beyond bulk's first runs.
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.bulk->held_count() != 0; }));
  auto claimed = vm.touch(0, 1);
  auto other = vm.touch(1, 63);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kFaultCount) == 2; }));
  const auto old_demand = vm.demand;
  const auto old_bulk = vm.bulk;
  vm.source.forget_all();
  (cut_demand ? old_demand : old_bulk)->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  EXPECT_TRUE(PagerHarness::waits(claimed));
  EXPECT_TRUE(PagerHarness::waits(other));
  // While disconnected the session still serves what it can: known zeros.
  auto zero = vm.touch(0, 5);
  ASSERT_TRUE(PagerHarness::arrives(zero));
  EXPECT_EQ(zero.get(), 0u);

  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(PagerHarness::arrives(claimed));
  ASSERT_TRUE(PagerHarness::arrives(other));
  EXPECT_EQ(claimed.get(), vm.expected(0, 1));
  EXPECT_EQ(other.get(), vm.expected(1, 63));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_TRUE(old_demand->was_destroyed());
  EXPECT_TRUE(old_bulk->was_destroyed());
  EXPECT_EQ(vm.counter(TargetCounter::kReconnectCount), 1u);
  EXPECT_EQ(vm.bad_pages(), 0u);
}
INSTANTIATE_TEST_SUITE_P(EitherConnection, RaceReconnect, ::testing::Values(true, false));

TEST(Race, ConnectionsThatBreakAgainAndAgain) {
  PagerHarness vm(PagerHarness::Specs{{2048}});
  vm.start();
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> bad{0};
  std::vector<std::thread> vcpus;
  for (uint64_t t = 0; t < 3; ++t) {
    vcpus.emplace_back([&, t] {
      for (uint64_t page = t; page < 2048 && !stop; page += 3) {
        const auto* words = reinterpret_cast<const volatile uint64_t*>(vm.regions[0].base + page * kPage);
        if (words[page % 512] != vm.expected(0, page, page % 512)) ++bad;
      }
    });
  }
  uint64_t reconnects = 0;
  while (vm.session->state() != TargetState::kComplete && reconnects < 20) {
    (reconnects % 2 == 0 ? vm.demand : vm.bulk)->disconnect();
    if (!test::eventually([&] { return vm.session->state() != TargetState::kFilling; })) break;
    if (vm.session->state() != TargetState::kDisconnected) break;
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ++reconnects;
  }
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  for (auto& vcpu : vcpus) vcpu.join();
  EXPECT_EQ(bad, 0u);
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(Race, CloseWhileDisconnected) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.start(false);
  vm.demand->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kClosed);
  EXPECT_EQ(vm.session->connect(vm.endpoints()).error().code, ErrorCode::kClosed);
}

}  // namespace
}  // namespace vmigrate::pager
