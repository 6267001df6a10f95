// Tests two threads that meet on one page. Each test parks one of them, then checks whether the other waits
// or continues, and whether it sees the right bytes.

#include <fcntl.h>
#include <gtest/gtest.h>

#include "base/page_key.hpp"
#include "image/serve/limits.hpp"
#include "tests/image/harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::eventually;
using test::Gates;
using test::ImageHarness;
using test::kPage;
using test::Parking;
using test::waits;
using wire::ImageCounter;
using wire::InjectPoint;

/// The sweep's chunks begin with these pages.
constexpr uint64_t kFirstChunk = 0, kChunkPages = 64;

void finish(ImageHarness& vm) {
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  EXPECT_FALSE(vm.parent->is_registered());
  for (const auto& clone : vm.clones) {
    EXPECT_FALSE(clone->is_registered());
  }
}

TEST(ImageRace, AWriteOfTheParentWaitsForThePageThatTheSweepHasClaimed) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  vm.arm();
  parking.arm(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kFirstChunk}));
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  auto claimed = vm.parent->write(3, 1);
  auto elsewhere = vm.parent->write(200, 2);
  EXPECT_TRUE(arrives(elsewhere));
  EXPECT_TRUE(waits(claimed));
  parking.release();
  EXPECT_TRUE(arrives(claimed));
  finish(vm);
}

TEST(ImageRace, SeveralClonesWaitForOnePageThatTheSweepHasClaimed) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  for (int i = 0; i < 3; ++i) vm.add_clone();
  vm.arm();
  parking.arm(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kFirstChunk}));
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  std::vector<std::future<uint64_t>> reads;
  for (const auto& clone : vm.clones) reads.push_back(clone->read(5));
  auto writing = vm.parent->write(5, 1);
  ASSERT_TRUE(eventually([&] { return vm.counter(ImageCounter::kCloneFaultCount) == 3; }));
  for (auto& read : reads) EXPECT_TRUE(waits(read, 20ms));
  // A wait for a claimed page does not delay faults on other pages.
  auto elsewhere = vm.clones[0]->read(100);
  EXPECT_TRUE(arrives(elsewhere));
  parking.release();
  for (auto& read : reads) {
    ASSERT_TRUE(arrives(read));
    EXPECT_EQ(read.get(), vm.expected(5));
  }
  EXPECT_TRUE(arrives(writing));
  finish(vm);
}

TEST(ImageRace, APageComesWhileItsFaultIsBeingLookedAt) {
  for (const bool is_clone : {false, true}) {
    Gates gates;
    ImageHarness vm(ImageHarness::Specs{{256}});
    vm.open();
    auto& clone = vm.add_clone();
    vm.arm();
    // Keeps the sweep from finishing before the fault is read.
    auto& sweep = gates.close(InjectPoint::kImageSweepClaimed);
    auto& fault = gates.close(InjectPoint::kImageFaultRead, page_key(0, PageIndex{130}));
    vm.seal();
    ASSERT_TRUE(gates.wait_parked(sweep));
    auto access = is_clone ? clone.read(130) : vm.parent->write(130, 1);
    ASSERT_TRUE(gates.wait_parked(fault));
    gates.open(sweep);
    ASSERT_TRUE(eventually([&] { return vm.counter(ImageCounter::kPagesCopied) == 256; }));
    if (is_clone) {
      EXPECT_TRUE(waits(access));
    }
    gates.open(fault);
    ASSERT_TRUE(arrives(access));
    if (is_clone) {
      EXPECT_EQ(access.get(), vm.expected(130));
    }
    finish(vm);
  }
}

TEST(ImageRace, AWriteOnAPageThatIsCopiedAndNotYetReleased) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  parking.arm(InjectPoint::kImagePublished, page_key(0, PageIndex{kFirstChunk}));
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  auto writing = vm.parent->write(9, 1);
  EXPECT_TRUE(arrives(writing));
  auto reading = clone.read(9);
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(9));
  // The protection that the sweep removes now is removed already, and the page is still as it was copied.
  parking.release();
  finish(vm);
}

TEST(ImageRace, TheSweepGoesAroundWhatAFaultHasClaimed) {
  Gates gates;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  vm.arm();
  auto& sweep = gates.close(InjectPoint::kImageSweepClaimed);
  auto& fault = gates.close(InjectPoint::kImageClaimed, page_key(0, PageIndex{144}));
  vm.seal();
  ASSERT_TRUE(gates.wait_parked(sweep));
  auto writing = vm.parent->write(150, 1);
  ASSERT_TRUE(gates.wait_parked(fault));
  gates.open(sweep);
  ASSERT_TRUE(eventually([&] { return vm.counter(ImageCounter::kPagesCopied) == 256 - 16; }));
  EXPECT_TRUE(waits(writing));
  EXPECT_EQ(vm.capture->state(), ImageState::kCopying);
  gates.open(fault);
  EXPECT_TRUE(arrives(writing));
  finish(vm);
}

TEST(ImageRace, FaultsWhileTheLastPagesAreBeingLetGo) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  parking.arm(InjectPoint::kImageFinish);
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  auto reading = clone.read(77);
  EXPECT_TRUE(waits(reading));
  parking.release();
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(77));
  finish(vm);
}

TEST(ImageRace, WritesOfTheParentWhileItIsBeingArmed) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{8192}});  // two pieces
  vm.open();
  parking.arm(InjectPoint::kImageArm, kImagePieceBytes);
  auto arming = std::async(std::launch::async, [&] { return vm.capture->arm().ok(); });
  ASSERT_TRUE(parking.wait_parked());
  EXPECT_EQ(vm.capture->state(), ImageState::kArming);
  auto is_protected = vm.parent->write(10, 1);
  auto is_not_yet = vm.parent->write(8000, 2);
  EXPECT_TRUE(arrives(is_protected));
  EXPECT_TRUE(arrives(is_not_yet));
  EXPECT_EQ(vm.counter(ImageCounter::kNotedFaultCount), 1u);
  // Runs on the fault thread, which allows a write before it notes it.
  vm.capture->remove_clone(vm.parent->memory);
  parking.release();
  ASSERT_TRUE(arming.get());
  // Arming has cleared the note again, so the next write is counted once more.
  auto again = vm.parent->write(11, 3);
  EXPECT_TRUE(arrives(again));
  EXPECT_EQ(vm.counter(ImageCounter::kNotedFaultCount), 2u);
  vm.seal();
  finish(vm);
}

TEST(ImageRace, CloseWhileArming) {
  Gates gates;
  ImageHarness vm(ImageHarness::Specs{{8192}});
  vm.open();
  auto& piece = gates.close(InjectPoint::kImageArm, kImagePieceBytes);
  auto arming = std::async(std::launch::async, [&] { return vm.capture->arm(); });
  ASSERT_TRUE(gates.wait_parked(piece));
  auto& stop = gates.close(InjectPoint::kImageStop);
  auto closing = std::async(std::launch::async, [&] { vm.capture->close(); });
  ASSERT_TRUE(gates.wait_parked(stop));
  gates.open(stop);
  EXPECT_EQ(closing.wait_for(50ms), std::future_status::timeout);
  gates.open(piece);
  const Status armed = arming.get();
  ASSERT_FALSE(armed.ok());
  EXPECT_EQ(armed.error().code, ErrorCode::kClosed);
  closing.get();
  EXPECT_EQ(vm.capture->state(), ImageState::kClosed);
  EXPECT_FALSE(vm.parent->is_registered());
  auto writing = vm.parent->write(0, 1);
  EXPECT_TRUE(arrives(writing));
}

TEST(ImageRace, CloseWhileAFaultIsBeingServedAndTheSweepIsAtWork) {
  for (const bool is_fault : {true, false}) {
    Gates gates;
    ImageHarness vm(ImageHarness::Specs{{256}});
    vm.open();
    vm.arm();
    auto& sweep = gates.close(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kFirstChunk}));
    auto& fault = gates.close(InjectPoint::kImageClaimed);
    auto& stop = gates.close(InjectPoint::kImageStop);
    vm.seal();
    ASSERT_TRUE(gates.wait_parked(sweep));
    auto writing = vm.parent->write(200, 1);
    ASSERT_TRUE(gates.wait_parked(fault));
    auto closing = std::async(std::launch::async, [&] { vm.capture->close(); });
    ASSERT_TRUE(gates.wait_parked(stop));
    gates.open(stop);
    // The caller waits for either of them.
    gates.open(is_fault ? sweep : fault);
    EXPECT_EQ(closing.wait_for(20ms), std::future_status::timeout);
    gates.open(is_fault ? fault : sweep);
    closing.get();
    EXPECT_EQ(vm.capture->state(), ImageState::kClosed);
    EXPECT_TRUE(arrives(writing));
    EXPECT_FALSE(vm.parent->is_registered());
    EXPECT_TRUE(test::image_threads_end());
  }
}

TEST(ImageRace, ACloneIsTakenOutWhileItWaits) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  auto& clone = vm.add_clone();
  auto& other = vm.add_clone();
  vm.arm();
  parking.arm(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kFirstChunk}));
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  auto reading = clone.read(4);
  auto staying = other.read(4);
  ASSERT_TRUE(eventually([&] { return vm.counter(ImageCounter::kCloneFaultCount) == 2; }));
  vm.capture->remove_clone(clone.memory);
  parking.release();
  EXPECT_TRUE(arrives(staying));
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_TRUE(waits(reading));
  EXPECT_TRUE(clone.is_registered());
  // The next capture of the image, or a daemon that resumes it, finds it unchanged.
  ASSERT_TRUE(vm.capture->add_clone(clone.memory).ok());
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(4));
  finish(vm);
}

TEST(ImageRace, LeaveInTheMiddleAndGoOnInAnotherCapture) {
  Gates gates;
  ImageHarness vm(ImageHarness::Specs{{256, [](uint64_t page) { return page % 8 != 7; }}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  auto& sweep = gates.close(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kChunkPages}));
  auto& stop = gates.close(InjectPoint::kImageStop);
  vm.seal();
  ASSERT_TRUE(gates.wait_parked(sweep));
  auto leaving = std::async(std::launch::async, [&] { vm.capture->leave(); });
  ASSERT_TRUE(gates.wait_parked(stop));
  gates.open(stop);
  EXPECT_EQ(leaving.wait_for(20ms), std::future_status::timeout);
  gates.open(sweep);
  leaving.get();
  EXPECT_EQ(vm.capture->state(), ImageState::kClosed);
  EXPECT_TRUE(vm.parent->is_registered());
  auto writing = vm.parent->write(200, 1);
  auto reading = clone.read(210);
  EXPECT_TRUE(waits(writing));
  EXPECT_TRUE(waits(reading));
  vm.capture.reset();
  EXPECT_TRUE(test::image_threads_end());

  // As if the process had died with a page claimed: its parent was never allowed to write to that page.
  {
    const UniqueFd presence(::open(vm.presence_paths[0].c_str(), O_RDWR | O_CLOEXEC));
    const auto claimed = static_cast<uint8_t>(wire::PageState::kClaimed);
    ASSERT_EQ(::pwrite(presence.get(), &claimed, 1, wire::kPresenceHeaderBytes + 220), 1);
  }
  vm.open(/*resume=*/true);
  const uint64_t taken_over = vm.counter(ImageCounter::kPagesCopied);
  EXPECT_GT(taken_over, 0u);
  EXPECT_LT(taken_over, 256u);
  EXPECT_FALSE(vm.capture->arm().ok());
  EXPECT_EQ(vm.capture->state(), ImageState::kIdle);
  ASSERT_TRUE(vm.capture->resume().ok());
  ASSERT_TRUE(vm.capture->add_clone(clone.memory).ok());
  EXPECT_TRUE(arrives(writing));
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(210));
  EXPECT_EQ(vm.bad_pages(clone), 0u);
  finish(vm);
}

// The fault that waits for the sweep was read. Once the capture is left, no thread answers that fault any
// more.
TEST(ImageRace, FaultsThatWereReadAndNotAnsweredAreReportedAgain) {
  Gates gates;
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  auto& sweep = gates.close(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{kFirstChunk}));
  auto& fault = gates.close(InjectPoint::kImageFaultRead, page_key(0, PageIndex{200}));
  auto& stop = gates.close(InjectPoint::kImageStop);
  vm.seal();
  ASSERT_TRUE(gates.wait_parked(sweep));
  auto reading = clone.read(5);
  auto writing = vm.parent->write(6, 1);
  ASSERT_TRUE(eventually([&] {
    return vm.counter(ImageCounter::kCloneFaultCount) + vm.counter(ImageCounter::kParentFaultCount) == 2;
  }));
  // Keeps the fault thread from checking those faults after the sweep has continued.
  auto last = clone.read(200);
  ASSERT_TRUE(gates.wait_parked(fault));
  auto leaving = std::async(std::launch::async, [&] { vm.capture->leave(); });
  ASSERT_TRUE(gates.wait_parked(stop));
  gates.open(stop);
  EXPECT_EQ(leaving.wait_for(20ms), std::future_status::timeout);
  gates.open(sweep);
  gates.open(fault);
  leaving.get();
  vm.capture.reset();
  EXPECT_TRUE(waits(reading));

  vm.open(/*resume=*/true);
  ASSERT_TRUE(vm.capture->add_clone(clone.memory).ok());
  ASSERT_TRUE(vm.capture->resume().ok());
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(5));
  EXPECT_TRUE(arrives(writing));
  EXPECT_TRUE(arrives(last));
  finish(vm);
}

TEST(ImageRace, GivenUpBeforeItIsTakenUpAgain) {
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  vm.arm();
  vm.capture->leave();
  vm.capture.reset();
  auto writing = vm.parent->write(200, 1);
  EXPECT_TRUE(waits(writing));
  vm.open(/*resume=*/true);
  vm.capture->close();
  EXPECT_TRUE(arrives(writing));
  EXPECT_FALSE(vm.parent->is_registered());
}

TEST(ImageRace, ReleaseWithoutACapture) {
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  vm.arm();
  vm.capture->leave();
  vm.capture.reset();
  auto writing = vm.parent->write(200, 1);
  EXPECT_TRUE(waits(writing));
  ASSERT_TRUE(release_vm(vm.parent->memory).ok());
  EXPECT_TRUE(arrives(writing));
  EXPECT_FALSE(vm.parent->is_registered());
  EXPECT_TRUE(release_vm(vm.parent->memory).ok());
}

}  // namespace
}  // namespace vmigrate::pager
