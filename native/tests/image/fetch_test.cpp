// Tests an image that is filled from a holder on another host, and the clones that run on it meanwhile.

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/stat.h>

#include "fetch/limits.hpp"
#include "tests/image/fetch_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::all_but_each_fourth;
using test::arrives;
using test::FakeControl;
using test::FetchHarness;
using test::Gates;
using test::kPage;
using wire::ImageCounter;
using wire::InjectPoint;

/// Reads of pages, not of the map.
std::function<bool(const transport::Operation&)> of_page(uint64_t page) {
  return [page](const transport::Operation& op) {
    return op.local_offset_bytes <= page * kPage && page * kPage < op.local_offset_bytes + op.length_bytes &&
           static_cast<uint32_t>(op.local) == 0;
  };
}

TEST(ImageFetch, FillsTheImageWhileClonesRunOnIt) {
  FetchHarness host(FetchHarness::Specs{{4096, all_but_each_fourth}, {64}});
  host.finish_maps();
  host.open();
  auto& early = host.add_clone();
  auto first = early.read(5);
  EXPECT_TRUE(test::waits(first));
  EXPECT_FALSE(host.fetch->start().ok());
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  EXPECT_FALSE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.fetch->start().ok());
  EXPECT_FALSE(host.fetch->start().ok());
  ASSERT_TRUE(arrives(first));
  EXPECT_EQ(first.get(), host.expected(5));
  auto& late = host.add_clone();
  EXPECT_FALSE(host.fetch->add_clone(late.memory).ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  EXPECT_EQ(host.bad_pages(early), 0u);
  EXPECT_EQ(host.bad_pages(late), 0u);
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  auto& after = host.add_clone();
  EXPECT_EQ(host.bad_pages(after), 0u);
  for (const auto& clone : host.clones) EXPECT_FALSE(clone->is_registered());
  EXPECT_EQ(host.counter(ImageCounter::kPagesTotal), 4096u + 64u);
  EXPECT_EQ(host.counter(ImageCounter::kPagesCopied) + host.counter(ImageCounter::kPagesZero), 4096u + 64u);
  EXPECT_GE(host.counter(ImageCounter::kPagesZero), 1000u);
  EXPECT_EQ(host.counter(ImageCounter::kCopiedBytes), host.counter(ImageCounter::kPagesCopied) * kPage);
  EXPECT_TRUE(host.fetch->sweep().ok());
  EXPECT_TRUE(test::image_threads_end());
  EXPECT_TRUE(host.demand->was_destroyed());
  EXPECT_TRUE(host.bulk->was_destroyed());
}

TEST(ImageFetch, RecordsInWhichOrderClonesTouchIt) {
  FetchHarness host(FetchHarness::Specs{{160, all_but_each_fourth}, {64}});
  host.finish_maps();
  host.start();
  auto& one = host.add_clone();
  auto& other = host.add_clone();
  EXPECT_TRUE(host.fetch->touched().empty());
  EXPECT_EQ(one.read(100).get(), host.expected(100));
  EXPECT_EQ(other.read(19).get(), 0u);  // a hole
  EXPECT_EQ(other.read(96).get(), host.expected(96));
  EXPECT_EQ(other.read(17, 1).get(), host.expected(17, 1));
  const std::vector<uint32_t> order{6, 1, 11};
  EXPECT_EQ(host.fetch->touched(), order);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.fetch->touched(), order);
}

TEST(ImageFetch, SweepsInTheOrderOfEarlierClonesAndThenUpwards) {
  FetchHarness host(FetchHarness::Specs{{1024, all_but_each_fourth}, {64, all_but_each_fourth}});
  host.finish_maps();
  host.start();
  // Nothing is swept of a region whose holes are not known yet, whatever the order says.
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kPagesZero) == (1024 + 64) / 4; }));
  std::vector<uint64_t> read;  // pages, those of the second region from 10 000 on
  {
    const std::lock_guard lock(host.bulk->mutex);
    host.bulk->judge = [&](const transport::Operation& op) {
      const auto region = static_cast<uint32_t>(op.local);
      for (uint64_t i = 0; region < 2 && i < op.length_bytes / kPage; ++i)
        read.push_back(region * 10'000 + op.local_offset_bytes / kPage + i);
      return FakeControl::Verdict::kComplete;
    };
  }
  // Two of these clusters do not exist.
  ASSERT_TRUE(host.fetch->sweep({65, 10, 3, 4, 3'000'000'000u, 70, 3}).ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(host.add_clone()), 0u);
  std::vector<uint64_t> expected;
  const auto add = [&](uint64_t first, uint64_t end) {
    for (uint64_t page = first; page < end; ++page)
      if (all_but_each_fourth(page % 10'000)) expected.push_back(page);
  };
  add(10'016, 10'032);
  add(160, 176);
  add(48, 80);
  EXPECT_EQ(host.counter(ImageCounter::kOrderedBytes), expected.size() * kPage);
  add(0, 48);
  add(80, 160);
  add(176, 1024);
  add(10'000, 10'016);
  add(10'032, 10'064);
  const std::lock_guard lock(host.bulk->mutex);
  EXPECT_EQ(read, expected);
}

TEST(ImageFetch, ReadsOnlyWhatClonesTouchUntilItIsToldToSweep) {
  FetchHarness host(FetchHarness::Specs{{2048, all_but_each_fourth}});
  host.finish_maps();
  host.start();
  auto& clone = host.add_clone();
  for (uint64_t page = 0; page < 64; ++page) EXPECT_EQ(clone.read(page * 16).get(), host.expected(page * 16));
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kPagesZero) == 512; }));
  EXPECT_EQ(clone.read(3).get(), 0u);
  EXPECT_EQ(host.counter(ImageCounter::kPagesCopied), 64u);
  EXPECT_EQ(host.counter(ImageCounter::kPrefetchBytes), 0u);
  EXPECT_EQ(host.allocated_bytes(), 64 * kPage);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

TEST(ImageFetch, ReadsAPageOnceHoweverManyClonesWait) {
  FetchHarness host(FetchHarness::Specs{{256}});
  host.finish_maps();
  host.start();
  host.demand->hold_if(of_page(9));
  std::vector<std::future<uint64_t>> readings;
  for (int i = 0; i < 12; ++i) readings.push_back(host.add_clone().read(9));
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kCloneFaultCount) == 12; }));
  EXPECT_EQ(host.demand->held_count(), 1u);
  host.demand->release_all();
  for (auto& reading : readings) EXPECT_EQ(reading.get(), host.expected(9));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), kPage);
}

/// Each clone's page stays on its way, until no more can be asked for.
TEST(ImageFetch, MoreFaultsThanItCanAskForWaitForTheirTurn) {
  constexpr uint64_t kCount = kDemandFetchesMax + 40;
  FetchHarness host(FetchHarness::Specs{{512}});
  host.start();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t page = 0; page < kCount; ++page) readings.push_back(clone.read(page));
  ASSERT_TRUE(test::eventually([&] { return host.demand->held_count() == kDemandFetchesMax; }));
  host.demand->release_all();
  for (uint64_t page = 0; page < kCount; ++page) EXPECT_EQ(readings[page].get(), host.expected(page));
}

/// More faults than the list of waits has places: the others stay in the kernel, and completions still come.
TEST(ImageFetch, MoreWaitsThanItCanNoteStayInTheKernel) {
  constexpr uint64_t kCount = 330;
  FetchHarness host(FetchHarness::Specs{{8}});
  host.start();
  host.demand->hold_all();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t i = 0; i < kCount / 10; ++i) {
    auto& clone = host.add_clone();
    for (int thread = 0; thread < 10; ++thread) readings.push_back(clone.read(i % 8));
  }
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kCloneFaultCount) >= 200; }));
  host.demand->release_all();
  for (auto& reading : readings) ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 8 * kPage);
}

TEST(ImageFetch, ALostConnectionKeepsClonesWaitingUntilTheNext) {
  FetchHarness host(FetchHarness::Specs{{1024}});
  host.finish_maps();
  host.start();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  auto reading = clone.read(77);
  ASSERT_TRUE(test::eventually([&] { return host.demand->held_count() == 1; }));
  EXPECT_FALSE(host.fetch->connect(host.endpoints()).ok());
  const auto lost = host.demand;
  ASSERT_TRUE(host.reaches(ImageState::kCopying));
  host.fetch->close();
  EXPECT_TRUE(test::waits(reading));
  EXPECT_EQ(host.fetch->state(), ImageState::kClosed);
  host.fetch.reset();
  // The next daemon: the page was claimed by a process that is gone.
  host.open(/*resume=*/true);
  EXPECT_TRUE(host.fetch->add_clone(clone.memory).ok());
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(77));
  // A connection that breaks, of either lane.
  for (const bool is_demand : {true, false}) {
    const int before = host.edges;
    auto& control = is_demand ? host.demand : host.bulk;
    control->hold_all();
    auto waiting = clone.read(is_demand ? 100 : 200);
    control->disconnect();
    ASSERT_TRUE(host.reaches(ImageState::kDisconnected));
    // The state is stored before the owner is told.
    EXPECT_TRUE(test::eventually([&] { return host.edges > before; }));
    ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
    ASSERT_TRUE(arrives(waiting));
    EXPECT_EQ(waiting.get(), host.expected(is_demand ? 100 : 200));
    EXPECT_EQ(host.fetch->state(), ImageState::kCopying);
  }
  EXPECT_EQ(host.counter(ImageCounter::kReconnectCount), 2u);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

TEST(ImageFetch, AHolderThatRefusesAPageFailsTheImageAndNoCloneReadsZeros) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  host.start();
  auto& clone = host.add_clone();
  host.demand->fail_with(transport::OpResult::kIoError);
  auto reading = clone.read(8);
  ASSERT_TRUE(host.reaches(ImageState::kFailed));
  EXPECT_EQ(host.fetch->failure()->code, ErrorCode::kRegionChanged);
  EXPECT_TRUE(test::waits(reading));
  EXPECT_FALSE(host.fetch->sweep().ok());
  EXPECT_TRUE(test::image_threads_end());
  host.fetch->remove_clone(clone.memory);
  // Only its owner ends the waiting.
  ASSERT_TRUE(release_vm(clone.memory).ok());
  ASSERT_TRUE(arrives(reading));
}

TEST(ImageFetch, ACloneThatIsRemovedIsForgottenWithItsWaits) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.start();
  host.demand->hold_all();
  auto& one = host.add_clone();
  auto& other = host.add_clone();
  auto of_one = one.read(3);
  auto of_other = other.read(3);
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kCloneFaultCount) == 2; }));
  host.fetch->remove_clone(one.memory);
  host.demand->release_all();
  ASSERT_TRUE(arrives(of_other));
  EXPECT_EQ(of_other.get(), host.expected(3));
  EXPECT_TRUE(test::waits(of_one));
  ASSERT_TRUE(release_vm(one.memory).ok());
  ASSERT_TRUE(arrives(of_one));
}

/// F11 and F12: bulk publishes a page between the fault that found it claimed and the note of that fault.
TEST(ImageFetch, APageThatBulkPublishesWhileAFaultIsNotedIsMapped) {
  FetchHarness host(FetchHarness::Specs{{512}});
  Gates gates;
  host.finish_maps();
  host.open();
  auto& clone = host.add_clone();
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  host.bulk->hold_if(
      [](const transport::Operation& op) { return op.length_bytes > wire::kDataMapHeaderBytes + 64; });
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(test::eventually([&] { return host.bulk->held_count() != 0; }));
  auto& at_fault = gates.close(InjectPoint::kImageFaultRead, page_key(0, PageIndex{0}));
  auto& published = gates.close(InjectPoint::kImagePublished);
  auto reading = clone.read(0);
  ASSERT_TRUE(gates.wait_parked(at_fault));
  host.bulk->release_all();
  ASSERT_TRUE(gates.wait_parked(published));
  gates.open(at_fault);
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(0));
  gates.open(published);
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

/// The fault is noted first, and bulk's publishing wakes it.
TEST(ImageFetch, AFaultOnAPageThatBulkHasIsWokenWhenItArrives) {
  FetchHarness host(FetchHarness::Specs{{512}});
  host.finish_maps();
  host.open();
  auto& clone = host.add_clone();
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  host.bulk->hold_if(
      [](const transport::Operation& op) { return op.length_bytes > wire::kDataMapHeaderBytes + 64; });
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(test::eventually([&] { return host.bulk->held_count() != 0; }));
  auto reading = clone.read(0);
  EXPECT_TRUE(test::waits(reading));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 0u);
  // Only that page: the last one of the image wakes everybody.
  host.bulk->hold_if([](const transport::Operation& op) {
    return op.length_bytes > wire::kDataMapHeaderBytes + 64 && !of_page(0)(op);
  });
  {
    const std::lock_guard lock(host.bulk->mutex);
    host.bulk->kick();
  }
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(0));
  EXPECT_EQ(host.fetch->state(), ImageState::kCopying);
}

TEST(ImageFetch, ASuccessorOfACompleteImageNeedsNoHolder) {
  FetchHarness host(FetchHarness::Specs{{128}});
  host.finish_maps();
  host.start();
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  host.fetch.reset();
  host.open(/*resume=*/true);
  auto& clone = host.add_clone();
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

TEST(ImageFetch, AnImageFileThatHasLostPagesIsNeverComplete) {
  FetchHarness host(FetchHarness::Specs{{256}});
  Gates gates;
  host.finish_maps();
  host.start();
  auto& finishing = gates.close(InjectPoint::kImageFinish);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(gates.wait_parked(finishing));
  const UniqueFd file(::open(host.image_paths[0].c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 16 * kPage), 0);
  gates.open(finishing);
  ASSERT_TRUE(host.reaches(ImageState::kFailed));
}

TEST(ImageFetch, RefusesKeysThatDoNotFit) {
  FetchHarness host(FetchHarness::Specs{{64}, {64}});
  host.open();
  auto wrong = host.endpoints();
  wrong.keys.pop_back();
  EXPECT_EQ(host.fetch->connect(std::move(wrong)).error().code, ErrorCode::kProtocol);
  auto shorter = host.endpoints();
  shorter.keys[0].ram.length_bytes -= kPage;
  EXPECT_EQ(host.fetch->connect(std::move(shorter)).error().code, ErrorCode::kProtocol);
}

}  // namespace
}  // namespace vmigrate::pager
