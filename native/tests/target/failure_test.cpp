// Tests what ends a session at the target: refusals, a source that lies about its data, a full file system. A
// vCPU that waits keeps waiting, and a later session takes over.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/mount.h>

#include "target/target.hpp"
#include "tests/support/broken_descriptor.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using test::kPage;
using test::PagerHarness;
using wire::TargetCounter;

struct Refusal {
  transport::OpResult result;
  ErrorCode code;
};

class TargetPagerRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(TargetPagerRefusal, FailsTheSessionAndNeverZeroFills) {
  PagerHarness vm(PagerHarness::Specs{{8}});
  vm.start(false);
  vm.demand->fail_with(GetParam().result);
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  ASSERT_TRUE(vm.session->failure());
  EXPECT_EQ(vm.session->failure()->code, GetParam().code);
  EXPECT_GT(vm.edges, 0);
  EXPECT_TRUE(PagerHarness::waits(reading)) << "the vCPU must wait, not read zeros";
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kFailed);
  EXPECT_TRUE(PagerHarness::waits(reading));
  // A later session takes over and the vCPU reads its page.
  vm.finish_maps();
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 3));
}

INSTANTIATE_TEST_SUITE_P(Results, TargetPagerRefusal,
                         ::testing::Values(Refusal{transport::OpResult::kBadKey, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kOutOfRange, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kNotAllowed, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kIoError, ErrorCode::kRegionChanged},
                                           Refusal{transport::OpResult::kNoSpace, ErrorCode::kNoSpace}));

void expect_failure(const PagerHarness& vm, ErrorCode code, int system_errno, const char* what) {
  ASSERT_TRUE(vm.session->failure());
  EXPECT_EQ(vm.session->failure()->code, code);
  EXPECT_EQ(vm.session->failure()->system_errno, system_errno);
  EXPECT_STREQ(vm.session->failure()->what, what);
}

TEST(TargetPagerCall, AUserfaultfdThatCannotBeReadIsNamedWithItsErrno) {
  PagerHarness vm(PagerHarness::Specs{{8}});
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  const test::BrokenDescriptor broken(vm.memory.descriptors[0].fd.get());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  expect_failure(vm, ErrorCode::kSystem, EISDIR, "read(userfaultfd)");
  vm.session->close();
}

TEST(TargetPagerCall, AWakeThatFailsIsNamedWithItsErrno) {
  PagerHarness vm(PagerHarness::Specs{{8}});
  vm.map_vm();
  vm.open();
  vm.session->close();
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  const test::BrokenDescriptor broken(vm.memory.descriptors[0].fd.get());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  expect_failure(vm, ErrorCode::kSystem, ENOTTY, "UFFDIO_WAKE");
  vm.session->close();
}

TEST(TargetPagerCall, AnUnregisterThatFailsIsNamedWithItsErrno) {
  PagerHarness vm(PagerHarness::Specs{{8}, {8, [](uint64_t) { return false; }}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  // The VM is alive and has unmapped a region that is all zeros, so that no call before the end of the
  // session touches the missing range.
  ASSERT_EQ(::munmap(vm.regions[1].base, vm.regions[1].length_bytes()), 0);
  vm.regions[1].base = nullptr;
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  expect_failure(vm, ErrorCode::kInvalidArgument, EINVAL, "UFFDIO_UNREGISTER");
}

TEST(TargetPagerCall, AContinueIntoAnUnmappedRangeKeepsItsErrno) {
  PagerHarness vm(PagerHarness::Specs{{8}, {8}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_EQ(::munmap(vm.regions[1].base, vm.regions[1].length_bytes()), 0);
  vm.regions[1].base = nullptr;
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  expect_failure(vm, ErrorCode::kProcessGone, ENOENT, "UFFDIO_CONTINUE");
}

class TargetPagerBadMap : public ::testing::TestWithParam<int> {};

TEST_P(TargetPagerBadMap, AnImpossibleDataMapFailsTheSession) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  SourceEndpoints endpoints = vm.endpoints();
  // A data map that the peer has made up.
  wire::DataMapHeader header{};
  header.magic = wire::kDataMapMagic;
  header.ready = 1;
  header.page_count = 16;
  header.data_page_count = 16;
  switch (GetParam()) {
    case 0:
      header.magic ^= 1;
      break;
    case 1:
      header.page_count = 17;
      break;
    case 2:
      header.ready = 2;
      break;
    case 3:
      header.data_page_count = UINT64_MAX;
      break;
    default:
      header.data_page_count = 3;  // the bits say 16
  }
  const UniqueFd fd(::memfd_create("hostile-map", MFD_CLOEXEC));
  ASSERT_EQ(::pwrite(fd.get(), &header, sizeof(header), 0), static_cast<ssize_t>(sizeof(header)));
  ASSERT_EQ(::pwrite(fd.get(), "\xff\xff", 2, sizeof(header)), 2);
  endpoints.keys[0].data_map = vm.source.expose(fd.get(), sizeof(header) + 2);
  ASSERT_TRUE(vm.session->connect(std::move(endpoints)).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  EXPECT_EQ(vm.session->failure()->code, ErrorCode::kProtocol);
}

INSTANTIATE_TEST_SUITE_P(Lies, TargetPagerBadMap, ::testing::Range(0, 5));

TEST(TargetPager, AFullFileSystemAtTheTargetIsNoSpace) {
  test::TempDir mount_point;
  if (::mount("tmpfs", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mount: not permitted here";
  }
  {
    PagerHarness vm(PagerHarness::Specs{{256}}, mount_point.path());
    // Another process takes most of the room after the region was created.
    const std::string hog = mount_point / "hog";
    const int fd = ::open(hog.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_EQ(::posix_fallocate(fd, 0, 512 << 10), 0);
    ::close(fd);
    vm.start();
    ASSERT_TRUE(vm.reaches(TargetState::kFailed));
    EXPECT_EQ(vm.session->failure()->code, ErrorCode::kNoSpace);
    auto reading = vm.touch(0, 255);
    EXPECT_TRUE(PagerHarness::waits(reading));
    // There is room again: a later session continues from the pages that are here.
    ASSERT_EQ(::unlink(hog.c_str()), 0);
    vm.session->close();
    vm.open(true);
    EXPECT_GT(vm.counter(TargetCounter::kPagesPresent), 0u);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(vm.reaches(TargetState::kComplete));
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(vm.bad_pages(), 0u);
  }
  ::umount(mount_point.path().c_str());
}

TEST(TargetPager, ZeroPagesAtAFullTargetAreNoSpaceToo) {
  test::TempDir mount_point;
  if (::mount("tmpfs", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mount: not permitted here";
  }
  {
    PagerHarness vm(PagerHarness::Specs{{128, [](uint64_t) { return false; }}, {2}}, mount_point.path());
    const std::string hog = mount_point / "hog";
    const int fd = ::open(hog.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    vm.map_vm();
    vm.finish_maps();
    vm.open();
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    // The second region keeps the session from finishing.
    const uint64_t held_key = 102;
    vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.key == held_key; });
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 128; }));
    uint64_t taken = 0;
    while (::posix_fallocate(fd, static_cast<off_t>(taken), kPage) == 0) taken += kPage;
    ::close(fd);
    auto reading = vm.touch(0, 64);
    ASSERT_TRUE(vm.reaches(TargetState::kFailed));
    EXPECT_EQ(vm.session->failure()->code, ErrorCode::kNoSpace);
    EXPECT_TRUE(PagerHarness::waits(reading));
    ::unlink(hog.c_str());
    vm.bulk->release_all();
    vm.session->close();
    vm.open(true);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), 0u);
  }
  ::umount(mount_point.path().c_str());
}

}  // namespace
}  // namespace vmigrate::pager
