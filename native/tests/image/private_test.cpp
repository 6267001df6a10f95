// Tests a parent that is itself a clone: the pages that it has written are in its process, and the rest is in
// the image that it runs on.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "base/page_key.hpp"
#include "tests/image/harness.hpp"
#include "tests/preload/preload_fixture.hpp"

namespace vmigrate::pager {
namespace {

using test::arrives;
using test::Gates;
using test::ImageHarness;
using test::kPage;
using test::VmKind;
using wire::ImageCounter;
using wire::InjectPoint;

constexpr uint64_t kWordsPerPage = kPage / 8;

class ImagePrivate : public ::testing::Test {
 protected:
  /// Pages 0 to 511 of the image that the parent runs on have data.
  ImagePrivate()
      : vm_(ImageHarness::Specs{{4096, [](uint64_t page) { return page < 512; }}}, {},
            VmKind::kPrivateParent) {
    vm_.open();
  }
  void write(uint64_t page, uint64_t value) {
    auto writing = vm_.parent->write(page, value);
    ASSERT_TRUE(arrives(writing));
    written_.emplace_back(page, value);
  }
  void seal() {
    vm_.seal();
    for (const auto& [page, value] : written_) vm_.fork_point[0][page * kWordsPerPage] = value;
  }
  uint64_t allocated_bytes() const {
    struct stat file {};
    EXPECT_EQ(::stat(vm_.source_paths[0].c_str(), &file), 0);
    return static_cast<uint64_t>(file.st_blocks) * 512;
  }

  ImageHarness vm_;
  std::vector<std::pair<uint64_t, uint64_t>> written_;
};

TEST_F(ImagePrivate, HoldsWhatTheParentHasWrittenAndWhatItShares) {
  write(10, 1);
  write(2000, 2);  // a hole of the file it runs on
  const uint64_t allocated = allocated_bytes();
  vm_.arm();
  write(11, 3);
  write(2001, 4);
  write(3000, 5);  // an own page since arming, unlike its neighbours
  ASSERT_TRUE(vm_.capture->protect().ok());
  auto& clone = vm_.add_clone();
  seal();
  for (const uint64_t page : {0u, 10u, 11u, 400u, 2000u, 3000u, 3001u, 4000u}) {
    auto after = vm_.parent->write(page, 99);
    ASSERT_TRUE(arrives(after)) << page;
  }
  ASSERT_TRUE(vm_.reaches(ImageState::kComplete));
  EXPECT_EQ(vm_.bad_image_pages(), 0u);
  EXPECT_EQ(vm_.bad_pages(clone), 0u);
  EXPECT_EQ(*vm_.parent->word(0, 2001), 4u);
  EXPECT_FALSE(vm_.parent->is_registered());
  // The capture neither copied holes nor filled them by looking at them, except for those that the parent
  // wrote to.
  EXPECT_GE(vm_.counter(ImageCounter::kPagesZero), 4096u - 512 - 5 - 2);
  EXPECT_LE(allocated_bytes(), allocated + 8 * kPage);
}

TEST_F(ImagePrivate, GoesOnInAnotherCapture) {
  write(10, 1);
  write(3000, 2);
  vm_.arm();
  Gates gates;
  auto& sweep = gates.close(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{64}));
  auto& stop = gates.close(InjectPoint::kImageStop);
  seal();
  ASSERT_TRUE(gates.wait_parked(sweep));
  auto leaving = std::async(std::launch::async, [&] { vm_.capture->leave(); });
  ASSERT_TRUE(gates.wait_parked(stop));
  gates.open(stop);
  gates.open(sweep);
  leaving.get();
  vm_.capture.reset();
  vm_.open(/*resume=*/true);
  ASSERT_TRUE(vm_.capture->resume().ok());
  ASSERT_TRUE(vm_.reaches(ImageState::kComplete));
  EXPECT_EQ(vm_.bad_image_pages(), 0u);
  EXPECT_GE(vm_.counter(ImageCounter::kPagesZero), 4096u - 512 - 1);
}

TEST(ImagePrivateProcess, WithoutTheProcessThereIsNoImage) {
  ImageHarness vm(ImageHarness::Specs{{1024}}, {}, VmKind::kPrivateParent);
  // A process that is gone: its address space can no longer be opened.
  test::ChildProcess child({"sleep", "1000"}, {});
  vm.parent->memory.pid = child.pid();
  child.kill_now();
  const auto opened = vm.try_open(false);
  ASSERT_FALSE(opened.ok());
  const auto without = vm.try_open(false, /*has_parent=*/false);
  ASSERT_FALSE(without.ok());
  EXPECT_EQ(without.error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace vmigrate::pager
