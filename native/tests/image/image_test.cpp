// Tests the content of an image, and which process may run on at which time. Races are in race_test.cpp,
// failures in failure_test.cpp.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "image/serve/limits.hpp"
#include "tests/image/harness.hpp"
#include "tests/support/huge_pages.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::all_but_each_fourth;
using test::arrives;
using test::ImageHarness;
using test::kPage;
using wire::ImageCounter;

constexpr uint64_t kLargePage = 2 << 20;

/// Up to two threads that write to random pages of the parent without end, each to its own words of a page.
/// They stop when told to.
class Writers {
 public:
  Writers(const ImageHarness& vm, unsigned count) {
    for (unsigned i = 0; i < count; ++i) threads_.emplace_back([&vm, this, i] { run(vm, i); });
  }
  ~Writers() {
    is_ended_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  void stop() {
    is_stopped_ = true;
    while (still_count_ != threads_.size()) std::this_thread::yield();
  }
  void go_on() { is_stopped_ = false; }
  uint64_t write_count() const { return write_count_; }

 private:
  void run(const ImageHarness& vm, unsigned index) {
    std::mt19937_64 random(index);
    while (!is_ended_) {
      if (is_stopped_) {
        ++still_count_;
        while (is_stopped_ && !is_ended_) std::this_thread::yield();
        --still_count_;
        continue;
      }
      const auto region = static_cast<uint32_t>(random() % vm.lengths.size());
      vm.parent->word(region, random() % (vm.lengths[region] / kPage))[random() % 256 * 2 + index] = random();
      ++write_count_;
    }
  }
  std::atomic<bool> is_ended_{false}, is_stopped_{false};
  std::atomic<size_t> still_count_{0};
  std::atomic<uint64_t> write_count_{0};
  std::vector<std::thread> threads_;
};

TEST(Image, HoldsTheForkPointWhateverTheParentWrites) {
  ImageHarness vm(ImageHarness::Specs{{8192, all_but_each_fourth}, {512}});
  vm.open();
  Writers writers(vm, 2);
  ASSERT_TRUE(test::eventually([&] { return writers.write_count() > 1000; }));
  vm.arm();
  ASSERT_TRUE(test::eventually([&] { return vm.counter(ImageCounter::kNotedFaultCount) > 20; }));
  writers.stop();
  ASSERT_TRUE(vm.capture->protect().ok());
  vm.seal();
  writers.go_on();
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  const uint64_t at_completion = writers.write_count();
  EXPECT_TRUE(test::eventually([&] { return writers.write_count() > at_completion + 1000; }));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  EXPECT_GT(vm.counter(ImageCounter::kRearmedPages), 0u);
  EXPECT_EQ(vm.counter(ImageCounter::kPagesTotal), 8192u + 512u);
  EXPECT_EQ(vm.counter(ImageCounter::kPagesCopied) + vm.counter(ImageCounter::kPagesZero), 8192u + 512u);
  EXPECT_FALSE(vm.parent->is_registered());
  EXPECT_TRUE(test::image_threads_end());
}

TEST(Image, ClonesRunWhileItFillsAndAfter) {
  ImageHarness vm(ImageHarness::Specs{{2048, all_but_each_fourth}, {64}});
  vm.open();
  auto& early = vm.add_clone();
  vm.arm();
  auto first = early.read(5);
  EXPECT_TRUE(test::waits(first));
  vm.seal();
  Writers writers(vm, 1);
  auto& late = vm.add_clone();
  EXPECT_TRUE(arrives(first));
  EXPECT_EQ(first.get(), vm.expected(5));
  EXPECT_EQ(vm.bad_pages(early), 0u);
  EXPECT_EQ(vm.bad_pages(late), 0u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  auto& after = vm.add_clone();
  EXPECT_EQ(vm.bad_pages(after), 0u);
  for (const auto& clone : vm.clones) EXPECT_FALSE(clone->is_registered());
  EXPECT_EQ(vm.bad_image_pages(), 0u);
}

TEST(Image, TheSweepMayWaitForTheClones) {
  ImageHarness vm(ImageHarness::Specs{{1024}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  EXPECT_FALSE(vm.capture->sweep().ok());
  vm.seal(pager::Sweep::kLater);
  auto reading = clone.read(5);
  auto writing = vm.parent->write(900, 1);
  EXPECT_TRUE(arrives(reading));
  EXPECT_TRUE(arrives(writing));
  EXPECT_EQ(reading.get(), vm.expected(5));
  // Two clusters: the requested pages, and nothing else.
  EXPECT_EQ(vm.counter(ImageCounter::kPagesCopied), 2 * pager::kImageClusterBytes / kPage);
  ASSERT_TRUE(vm.capture->sweep().ok());
  ASSERT_TRUE(vm.capture->sweep().ok());
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_TRUE(vm.capture->sweep().ok());
  EXPECT_EQ(vm.bad_image_pages(), 0u);
}

TEST(Image, ParentAndClonesMayAskForAllBeforeTheSweepBegins) {
  ImageHarness vm(ImageHarness::Specs{{256}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  vm.seal(pager::Sweep::kLater);
  EXPECT_EQ(vm.bad_pages(clone), 0u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_TRUE(vm.capture->sweep().ok());
  EXPECT_FALSE(vm.parent->is_registered());
}

TEST(Image, ACloneKeepsItsWritesToItself) {
  ImageHarness vm(ImageHarness::Specs{{256, all_but_each_fourth}});
  vm.open();
  auto& one = vm.add_clone();
  auto& other = vm.add_clone();
  vm.arm();
  vm.seal();
  for (uint64_t page = 0; page < 256; ++page) {
    auto writing = one.write(page, 1000 + page);
    ASSERT_TRUE(arrives(writing));
  }
  EXPECT_EQ(vm.bad_pages(other), 0u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  for (uint64_t page = 0; page < 256; ++page) ASSERT_EQ(*one.word(0, page), 1000 + page);
  EXPECT_EQ(vm.bad_pages(other), 0u);
}

TEST(Image, HolesAreNeverCopied) {
  ImageHarness vm(ImageHarness::Specs{{4096, [](uint64_t page) { return page < 64; }}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  // A hole when look_for_data was called, and data at the fork point.
  auto before = vm.parent->write(2000, 77);
  ASSERT_TRUE(arrives(before));
  vm.seal();
  auto after = vm.parent->write(3000, 88);
  ASSERT_TRUE(arrives(after));
  auto read = clone.read(3000);
  ASSERT_TRUE(arrives(read));
  EXPECT_EQ(read.get(), 0u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  EXPECT_EQ(vm.expected(2000), 77u);
  EXPECT_EQ(vm.bad_pages(clone), 0u);
  EXPECT_GE(vm.counter(ImageCounter::kPagesZero), 4096u - 64 - 32);
  EXPECT_LE(vm.counter(ImageCounter::kCopiedBytes), (64 + 32) * kPage);
}

TEST(Image, WritesBetweenArmAndSealAreInItAndProtectedAgain) {
  ImageHarness vm(ImageHarness::Specs{{1024}});
  vm.open();
  vm.arm();
  for (int round = 0; round < 3; ++round) {
    for (const uint64_t page : {0u, 1u, 500u, 1023u}) {
      auto writing = vm.parent->write(page, 100 * round + page);
      ASSERT_TRUE(arrives(writing));
    }
    ASSERT_TRUE(vm.capture->protect().ok());
  }
  // Each of the three clusters in each round, no more.
  EXPECT_EQ(vm.counter(ImageCounter::kNotedFaultCount), 9u);
  EXPECT_EQ(vm.counter(ImageCounter::kRearmedPages), 9u * 16);
  vm.seal();
  EXPECT_EQ(vm.expected(500), 700u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
}

TEST(Image, LargePagesOnTmpfs) {
  ImageHarness vm(ImageHarness::Specs{{2048, [](uint64_t page) { return page < 700; }, kLargePage}});
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  vm.seal();
  auto writing = vm.parent->write(600, 5);
  ASSERT_TRUE(arrives(writing));
  auto reading = clone.read(1500);
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  EXPECT_EQ(vm.bad_pages(clone), 0u);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  EXPECT_EQ(vm.counter(ImageCounter::kPagesTotal), 4u);
  EXPECT_EQ(vm.counter(ImageCounter::kPagesZero), 2u);
}

TEST(Image, HugePagesOfHugetlbfs) {
  const test::HugePages pages(12);
  if (!pages.is_mounted()) GTEST_SKIP() << "needs huge-pages: none can be reserved here";
  ImageHarness vm(ImageHarness::Specs{{1536, [](uint64_t) { return true; }, kLargePage}}, pages.path(),
                  test::VmKind::kParent, pages.path());
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  auto before = vm.parent->write(1000, 6);
  ASSERT_TRUE(arrives(before));
  vm.seal();
  auto after = vm.parent->write(1001, 7);
  ASSERT_TRUE(arrives(after));
  auto own = clone.write(3, 8);
  ASSERT_TRUE(arrives(own));
  auto shared = clone.read(1001);
  ASSERT_TRUE(arrives(shared));
  EXPECT_EQ(shared.get(), vm.expected(1001));
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.expected(1000), 6u);
  EXPECT_EQ(vm.bad_image_pages(), 0u);
  EXPECT_EQ(vm.counter(ImageCounter::kPagesCopied), 3u);
  EXPECT_FALSE(vm.parent->is_registered());
}

TEST(Image, WithoutAParentItIsCopiedFromItsFiles) {
  ImageHarness vm(ImageHarness::Specs{{512, all_but_each_fourth}});
  vm.open(false, /*has_parent=*/false);
  vm.arm();
  vm.seal();
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(vm.bad_image_pages(), 0u);
}

TEST(Image, CloseBeforeTheEndLetsTheParentGo) {
  for (const int steps : {0, 1, 2}) {
    ImageHarness vm(ImageHarness::Specs{{4096}});
    vm.open();
    if (steps > 0) vm.arm();
    if (steps > 1) vm.seal();
    vm.capture->close();
    vm.capture->close();
    EXPECT_TRUE(vm.capture->state() == ImageState::kClosed || vm.capture->state() == ImageState::kComplete);
    EXPECT_FALSE(vm.parent->is_registered()) << steps;
    EXPECT_TRUE(test::image_threads_end());
    auto writing = vm.parent->write(4000, 1);
    EXPECT_TRUE(arrives(writing));
    const Status late = vm.capture->arm();
    ASSERT_FALSE(late.ok());
  }
}

TEST(Image, CallsOutOfTurnChangeNothing) {
  ImageHarness vm(ImageHarness::Specs{{64}});
  vm.open();
  const auto code = [](const Status& status) { return status.ok() ? ErrorCode{} : status.error().code; };
  EXPECT_EQ(code(vm.capture->protect()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(vm.capture->seal()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(vm.capture->resume()), ErrorCode::kInvalidArgument);
  vm.arm();
  EXPECT_EQ(code(vm.capture->arm()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(vm.capture->resume()), ErrorCode::kInvalidArgument);
  auto& clone = vm.add_clone();
  EXPECT_EQ(code(vm.capture->add_clone(clone.memory)), ErrorCode::kAlreadyExists);
  vm.seal();
  EXPECT_EQ(code(vm.capture->seal()), ErrorCode::kInvalidArgument);
  ASSERT_TRUE(vm.reaches(ImageState::kComplete));
  EXPECT_EQ(code(vm.capture->protect()), ErrorCode::kInvalidArgument);
  EXPECT_EQ(vm.capture->failure(), std::nullopt);
  vm.capture->remove_clone(clone.memory);
  vm.capture->remove_clone(clone.memory);
}

TEST(Image, FilesThatDoNotFitAreRefused) {
  ImageHarness vm(ImageHarness::Specs{{64}});
  const auto code = [](const auto& result) { return result.ok() ? ErrorCode{} : result.error().code; };
  const auto config = [&] {
    ImageConfig made;
    made.parent = &vm.parent->memory;
    made.source = {{vm.source_paths[0], vm.lengths[0], kPage}};
    made.image = {{vm.image_paths[0], vm.presence_paths[0], vm.lengths[0], kPage}};
    return made;
  };
  auto longer = config();
  longer.image[0].length_bytes += kPage;
  EXPECT_EQ(code(ImageCapture::open(longer)), ErrorCode::kInvalidArgument);
  auto both_longer = longer;
  both_longer.source[0].length_bytes += kPage;
  EXPECT_EQ(code(ImageCapture::open(both_longer)), ErrorCode::kRegionChanged);
  auto missing = config();
  missing.image[0].path += ".none";
  EXPECT_EQ(code(ImageCapture::open(missing)), ErrorCode::kNotFound);
  auto fewer = config();
  fewer.image.clear();
  EXPECT_EQ(code(ImageCapture::open(fewer)), ErrorCode::kInvalidArgument);
  auto resumed = config();
  resumed.resume = true;
  EXPECT_EQ(code(ImageCapture::open(resumed)), ErrorCode::kNotFound);
  VmMemory part;
  part.ranges = vm.parent->memory.ranges;
  auto no_descriptor = config();
  no_descriptor.parent = &part;
  EXPECT_EQ(code(ImageCapture::open(no_descriptor)), ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace vmigrate::pager
