// Tests what happens when the image cannot be finished, or when a process that takes part is gone. The parent
// always runs on, and no process ever reads zeros in place of bytes.

#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstring>

#include "base/page_key.hpp"
#include "tests/image/harness.hpp"
#include "tests/preload/preload_fixture.hpp"
#include "tests/support/broken_descriptor.hpp"
#include "tests/support/small_tmpfs.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::eventually;
using test::ImageHarness;
using test::kMiB;
using test::kPage;
using test::Parking;
using test::SmallTmpfs;
using test::waits;
using wire::ImageCounter;
using wire::InjectPoint;

TEST(ImageFailure, AUserfaultfdThatCannotBeReadIsNamedWithItsErrno) {
  ImageHarness vm(ImageHarness::Specs{{64}});
  vm.open();
  vm.arm();
  std::future<uint64_t> writing;
  {
    const test::BrokenDescriptor broken(vm.parent->memory.descriptors[0].fd.get());
    writing = vm.parent->write(3, 1);
    ASSERT_TRUE(vm.reaches(ImageState::kFailed));
    ASSERT_TRUE(vm.capture->failure());
    EXPECT_EQ(vm.capture->failure()->code, ErrorCode::kSystem);
    EXPECT_EQ(vm.capture->failure()->system_errno, EISDIR);
    EXPECT_STREQ(vm.capture->failure()->what, "read(userfaultfd)");
    vm.capture->close();
  }
  ASSERT_TRUE(release_vm(vm.parent->memory).ok());
  EXPECT_TRUE(arrives(writing)) << "it can be let go once its descriptor works again";
}

TEST(ImageFailure, NoRoomLetsTheParentGo) {
  const SmallTmpfs full("size=2m");
  ASSERT_TRUE(full.is_mounted()) << strerror(errno);
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{2048}}, full.path());
  vm.open();
  auto& clone = vm.add_clone();
  vm.arm();
  parking.arm(InjectPoint::kImageSweepClaimed);
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  auto early = clone.read(2000);
  ASSERT_TRUE(arrives(early));
  EXPECT_EQ(early.get(), vm.expected(2000));
  parking.release();
  ASSERT_TRUE(vm.reaches(ImageState::kFailed));
  ASSERT_TRUE(vm.capture->failure().has_value());
  EXPECT_EQ(vm.capture->failure()->code, ErrorCode::kNoSpace);
  for (const uint64_t page : {0u, 700u, 2047u}) {
    auto writing = vm.parent->write(page, 1);
    EXPECT_TRUE(arrives(writing)) << page;
  }
  EXPECT_TRUE(eventually([&] { return !vm.parent->is_registered() && test::image_thread_count() == 0; }));
  auto missing = clone.read(1900);
  EXPECT_TRUE(waits(missing));
  EXPECT_GE(vm.edges, 1);
  vm.capture->close();
  EXPECT_EQ(vm.capture->state(), ImageState::kFailed);
  vm.capture.reset();
  // The end of a test must neither leave a thread behind that waits for ever, nor let it touch a full file
  // system.
  full.resize("size=64m");
  ASSERT_TRUE(release_vm(clone.memory).ok());
  missing.wait();
}

TEST(ImageFailure, ASourceFileThatShrinks) {
  Parking parking;
  ImageHarness vm(ImageHarness::Specs{{1024}});
  vm.open();
  vm.arm();
  parking.arm(InjectPoint::kImageSweepClaimed);
  vm.seal();
  ASSERT_TRUE(parking.wait_parked());
  ASSERT_EQ(::truncate(vm.source_paths[0].c_str(), 100 * kPage), 0);
  parking.release();
  ASSERT_TRUE(vm.reaches(ImageState::kFailed));
  EXPECT_EQ(vm.capture->failure()->code, ErrorCode::kRegionChanged);
  auto writing = vm.parent->write(5, 1);
  EXPECT_TRUE(arrives(writing));
}

TEST(ImageFailure, AnImageFileThatHasLostPagesIsNeverComplete) {
  for (const bool is_cut : {false, true}) {
    Parking parking;
    ImageHarness vm(ImageHarness::Specs{{1024}});
    vm.open();
    auto& clone = vm.add_clone();
    vm.arm();
    parking.arm(InjectPoint::kImageFinish);
    vm.seal();
    ASSERT_TRUE(parking.wait_parked());
    const UniqueFd image(::open(vm.image_paths[0].c_str(), O_RDWR | O_CLOEXEC));
    // The file is cut off and then as long as before again: the bytes that were copied behind the cut are now
    // a hole.
    ASSERT_EQ(is_cut ? ::ftruncate(image.get(), 700 * kPage) : 0, 0);
    ASSERT_EQ(is_cut
                  ? ::ftruncate(image.get(), 1024 * kPage)
                  : ::fallocate(image.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 700 * kPage, kPage),
              0);
    parking.release();
    ASSERT_TRUE(vm.reaches(ImageState::kFailed));
    EXPECT_EQ(vm.capture->failure()->code, ErrorCode::kRegionChanged);
    auto writing = vm.parent->write(5, 1);
    EXPECT_TRUE(arrives(writing));
    EXPECT_TRUE(eventually([&] { return !vm.parent->is_registered() && test::image_thread_count() == 0; }));
    auto missing = clone.read(700);
    EXPECT_TRUE(waits(missing));
    ASSERT_TRUE(release_vm(clone.memory).ok());
    missing.wait();
  }
}

TEST(ImageFailure, AKernelThatCannotProtectIsSaidToBeOne) {
  ImageHarness vm(ImageHarness::Specs{{64}});
  // A file that is neither on tmpfs nor on hugetlbfs: no kernel protects it through a userfaultfd.
  const UniqueFd program(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  ASSERT_NE(::mmap(vm.parent->base(0), vm.lengths[0], PROT_READ, MAP_PRIVATE | MAP_FIXED, program.get(), 0),
            MAP_FAILED);
  vm.open();
  const Status armed = vm.capture->arm();
  ASSERT_FALSE(armed.ok());
  EXPECT_EQ(armed.error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(vm.capture->state(), ImageState::kFailed);
}

/// Parent and clone are separate processes, with the preload.
class ImageProcesses : public test::PreloadTest {
 protected:
  void SetUp() override {
    PreloadTest::SetUp();
    source_ = region("ram", kLength);
    image_ = region("image", kLength);
    image_.is_private = true;
    const UniqueFd fd(::open(source_.path.c_str(), O_RDWR | O_CLOEXEC));
    for (uint64_t page = 0; page < kPages; ++page) test::write_pattern(fd.get(), 1, page);
    parent_memory_ = listen({source_}, /*incoming=*/false);
    parent_ = helper({source_});
    ASSERT_EQ(parent_->ask(test::map_line(source_)), "mapped 0");
    clone_memory_ = listen({image_});
    clone_ = helper({image_});
    ASSERT_EQ(clone_->ask(test::map_line(image_, "private")), "mapped 0");
    open(false);
  }

  void open(bool resume) {
    ImageConfig config;
    config.parent = parent_memory_ ? parent_memory_->memory() : nullptr;
    config.source = {{source_.path, kLength, kPage}};
    config.image = {{image_.path, path("presence"), kLength, kPage}};
    config.resume = resume;
    auto opened = ImageCapture::open(std::move(config));
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    capture_ = std::move(opened).value();
    ASSERT_TRUE(capture_->add_clone(*clone_memory_->memory()).ok());
  }

  void expect_complete_and_right() {
    ASSERT_TRUE(eventually([&] { return capture_->state() == ImageState::kComplete; }));
    const auto words = ImageHarness::contents(image_.path, kLength);
    for (uint64_t page = 0; page < kPages; ++page)
      for (uint64_t word = 0; word < 512; ++word)
        ASSERT_EQ(words[page * 512 + word], test::pattern_word(1, page, word)) << page;
  }
  static std::string first_byte(uint64_t page) {
    return "byte " + std::to_string(test::pattern_word(1, page, 0) & 0xff);
  }

  static constexpr uint64_t kLength = 4 * kMiB, kPages = kLength / kPage;
  RegionFileConfig source_, image_;
  std::unique_ptr<PreloadListener> parent_memory_, clone_memory_;
  std::unique_ptr<test::ChildProcess> parent_, clone_;
  std::unique_ptr<ImageCapture> capture_;  // last, because it uses the rest
};

TEST_F(ImageProcesses, AParentThatIsKilledLeavesItsFiles) {
  Parking parking;
  ASSERT_TRUE(capture_->arm().ok());
  parking.arm(InjectPoint::kImageSweepClaimed);
  ASSERT_TRUE(capture_->seal().ok());
  ASSERT_TRUE(parking.wait_parked());
  parent_->write_line("poke 0 8 1");  // waits, because the sweep has its page
  parent_->kill_now();
  parking.release();
  EXPECT_EQ(clone_->ask("touch 0 " + std::to_string(900 * kPage)), first_byte(900));
  expect_complete_and_right();
}

TEST_F(ImageProcesses, AParentThatIsKilledBeforeTheForkPointFailsIt) {
  ASSERT_TRUE(capture_->arm().ok());
  ASSERT_EQ(parent_->ask("poke 0 8 1"), "poked");
  parent_->kill_now();
  const Status sealed = capture_->seal();
  ASSERT_FALSE(sealed.ok());
  EXPECT_EQ(sealed.error().code, ErrorCode::kProcessGone);
  EXPECT_EQ(sealed.error().system_errno, ESRCH);
  EXPECT_STREQ(sealed.error().what, "UFFDIO_WRITEPROTECT");
  EXPECT_EQ(capture_->state(), ImageState::kFailed);
}

TEST_F(ImageProcesses, ACloneThatIsKilledHarmsNobody) {
  Parking parking;
  ASSERT_TRUE(capture_->arm().ok());
  parking.arm(InjectPoint::kImageSweepClaimed);
  ASSERT_TRUE(capture_->seal().ok());
  ASSERT_TRUE(parking.wait_parked());
  parking.arm(InjectPoint::kImageFaultRead);
  clone_->write_line("touch 0 " + std::to_string(900 * kPage));
  ASSERT_TRUE(parking.wait_parked());
  clone_->kill_now();
  parking.release();
  EXPECT_EQ(parent_->ask("poke 0 " + std::to_string(800 * kPage) + " 7"), "poked");
  expect_complete_and_right();
}

TEST_F(ImageProcesses, ParentAndCloneOutliveTheCapture) {
  test::Gates gates;
  ASSERT_TRUE(capture_->arm().ok());
  ASSERT_TRUE(parent_->ask("touch 0 0") == first_byte(0));
  auto& sweep = gates.close(InjectPoint::kImageSweepClaimed, page_key(0, PageIndex{64}));
  auto& stop = gates.close(InjectPoint::kImageStop);
  ASSERT_TRUE(capture_->seal().ok());
  ASSERT_TRUE(gates.wait_parked(sweep));
  auto leaving = std::async(std::launch::async, [&] { capture_->leave(); });
  ASSERT_TRUE(gates.wait_parked(stop));
  gates.open(stop);
  EXPECT_EQ(leaving.wait_for(20ms), std::future_status::timeout);
  gates.open(sweep);
  leaving.get();
  const auto parent_was = parent_memory_->snapshot(), clone_was = clone_memory_->snapshot();
  capture_.reset();
  parent_memory_.reset();
  clone_memory_.reset();
  parent_->write_line("poke 0 " + std::to_string(900 * kPage) + " 7");
  clone_->write_line("touch 0 " + std::to_string(901 * kPage));
  EXPECT_EQ(clone_->read_line(50ms), "(timeout)");
  EXPECT_EQ(parent_->read_line(50ms), "(timeout)");

  auto parent = PreloadListener::adopt(parent_was, {source_}, nullptr);
  ASSERT_TRUE(parent.ok()) << parent.error().what;
  parent_memory_ = std::move(parent).value();
  auto clone = PreloadListener::adopt(clone_was, {image_}, nullptr);
  ASSERT_TRUE(clone.ok()) << clone.error().what;
  clone_memory_ = std::move(clone).value();
  open(/*resume=*/true);
  ASSERT_TRUE(capture_->resume().ok());
  EXPECT_EQ(parent_->read_line(), "poked");
  EXPECT_EQ(clone_->read_line(), first_byte(901));
  expect_complete_and_right();
}

}  // namespace
}  // namespace vmigrate::pager
