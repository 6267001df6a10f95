#include "uffd/uffd.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "tests/support/pager_harness.hpp"

namespace vmigrate::uffd {
namespace {

using test::kPage;

constexpr uint64_t kModes = static_cast<uint64_t>(Mode::kMissing) | static_cast<uint64_t>(Mode::kMinor);

/// Eight pages of a file, mapped and registered.
class Uffd : public ::testing::Test {
 protected:
  void SetUp() override {
    fd_.reset(::memfd_create("uffd-test", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(fd_.get(), kLength), 0);
    void* base = ::mmap(nullptr, kLength, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    ASSERT_NE(base, MAP_FAILED);
    base_ = static_cast<std::byte*>(base);
    uffd_.reset(test::open_userfaultfd());
    ASSERT_TRUE(uffd_.valid()) << strerror(errno);
    ASSERT_EQ(register_range(uffd_.get(), at(0), kLength, kModes).outcome, Outcome::kDone);
  }
  void TearDown() override { ::munmap(base_, kLength); }
  HostAddr at(uint64_t page) const { return HostAddr{reinterpret_cast<uint64_t>(base_) + page * kPage}; }
  void fill(uint64_t page, uint64_t count) {
    const std::vector<char> bytes(count * kPage, 'd');
    ASSERT_EQ(::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(page * kPage)),
              static_cast<ssize_t>(bytes.size()));
  }
  std::future<char> touch(uint64_t page) {
    const volatile char* address = reinterpret_cast<const volatile char*>(base_ + page * kPage);
    return std::async(std::launch::async, [address] { return *address; });
  }
  FaultEvent next_fault() {
    FaultEvent fault{};
    EXPECT_TRUE(test::eventually([&] { return read_faults(uffd_.get(), {&fault, 1}).count == 1; }));
    return fault;
  }

  static constexpr uint64_t kLength = 8 * kPage;
  UniqueFd fd_, uffd_;
  std::byte* base_ = nullptr;
};

TEST_F(Uffd, NothingWaitingIsNoError) {
  FaultEvent fault;
  const ReadOutcome read = read_faults(uffd_.get(), {&fault, 1});
  EXPECT_EQ(read.outcome, Outcome::kDone);
  EXPECT_EQ(read.count, 0u);
}

TEST_F(Uffd, AMissingPageIsReportedContinuedAndWoken) {
  auto reading = touch(3);
  const FaultEvent fault = next_fault();
  EXPECT_EQ(raw(fault.address) / kPage, raw(at(3)) / kPage);
  EXPECT_FALSE(fault.is_minor);
  EXPECT_NE(fault.thread_id, 0u);
  fill(3, 1);
  const RangeOutcome done = continue_range(uffd_.get(), at(3), kPage);
  EXPECT_EQ(done.outcome, Outcome::kDone);
  EXPECT_EQ(done.done_bytes, kPage);
  EXPECT_EQ(reading.get(), 'd');
}

TEST_F(Uffd, APageThatIsInThePageCacheIsAMinorFault) {
  fill(2, 1);
  auto reading = touch(2);
  EXPECT_TRUE(next_fault().is_minor);
  EXPECT_EQ(continue_range(uffd_.get(), at(2), kPage).outcome, Outcome::kDone);
  EXPECT_EQ(reading.get(), 'd');
}

TEST_F(Uffd, ContinueStopsAtWhatIsMappedAndSaysWhere) {
  fill(0, 8);
  ASSERT_EQ(continue_range(uffd_.get(), at(5), kPage).outcome, Outcome::kDone);
  const RangeOutcome again = continue_range(uffd_.get(), at(0), kLength);
  EXPECT_EQ(again.outcome, Outcome::kExists);
  EXPECT_EQ(again.done_bytes, 5 * kPage);
  EXPECT_EQ(continue_range(uffd_.get(), at(6), 2 * kPage).outcome, Outcome::kDone);
}

TEST_F(Uffd, ContinueOfAHoleIsNoPage) {
  fill(0, 2);
  const RangeOutcome result = continue_range(uffd_.get(), at(0), 4 * kPage);
  EXPECT_EQ(result.outcome, Outcome::kNoPage);
  EXPECT_EQ(result.done_bytes, 2 * kPage);
  EXPECT_EQ(result.system_errno, EFAULT);
}

TEST_F(Uffd, ZeroMapsFreshPagesAndLeavesOthers) {
  auto reading = touch(1);
  (void)next_fault();
  EXPECT_EQ(zero_range(uffd_.get(), at(1), 2 * kPage).outcome, Outcome::kDone);
  EXPECT_EQ(reading.get(), 0);
  const RangeOutcome again = zero_range(uffd_.get(), at(0), 3 * kPage);
  EXPECT_EQ(again.outcome, Outcome::kExists);
  EXPECT_EQ(again.done_bytes, kPage);
}

TEST_F(Uffd, WakeMakesTheFaultComeAgain) {
  auto reading = touch(4);
  (void)next_fault();
  EXPECT_EQ(wake_range(uffd_.get(), at(0), kLength).outcome, Outcome::kDone);
  EXPECT_EQ(raw(next_fault().address) / kPage, raw(at(4)) / kPage);
  fill(4, 1);
  EXPECT_EQ(continue_range(uffd_.get(), at(4), kPage).outcome, Outcome::kDone);
  EXPECT_EQ(reading.get(), 'd');
}

TEST_F(Uffd, UnregisteringLetsWaitersReadTheFileItself) {
  fill(0, 1);
  auto data = touch(0);
  auto hole = touch(1);
  (void)next_fault();
  (void)next_fault();
  EXPECT_EQ(unregister_range(uffd_.get(), at(0), kLength).outcome, Outcome::kDone);
  EXPECT_EQ(data.get(), 'd');
  EXPECT_EQ(hole.get(), 0);
  EXPECT_EQ(unregister_range(uffd_.get(), at(0), kLength).outcome, Outcome::kDone) << "again is no error";
  EXPECT_EQ(continue_range(uffd_.get(), at(2), kPage).outcome, Outcome::kGone);
}

TEST_F(Uffd, ABrokenArgumentIsInvalid) {
  EXPECT_EQ(continue_range(uffd_.get(), HostAddr{raw(at(0)) + 1}, kPage).outcome, Outcome::kInvalid);
  EXPECT_EQ(wake_range(uffd_.get(), at(0), 1).outcome, Outcome::kInvalid);
  EXPECT_EQ(continue_range(-1, at(0), kPage).outcome, Outcome::kInvalid);
}

TEST(UffdRead, SaysWhyItCouldNot) {
  FaultEvent fault{};
  const ReadOutcome read = read_faults(-1, {&fault, 1});
  EXPECT_EQ(read.outcome, Outcome::kInvalid);
  EXPECT_EQ(read.count, 0u);
  EXPECT_EQ(read.system_errno, EBADF);
}

TEST(UffdError, KeepsErrnoAndCallAndSaysWhatItMeans) {
  const std::map<int, ErrorCode> meanings = {
      {ESRCH, ErrorCode::kProcessGone},      {ENOENT, ErrorCode::kProcessGone},
      {EFAULT, ErrorCode::kRegionChanged},   {ENOMEM, ErrorCode::kOutOfMemory},
      {ENOSPC, ErrorCode::kOutOfMemory},     {EPERM, ErrorCode::kNotPermitted},
      {EINVAL, ErrorCode::kInvalidArgument}, {EBADF, ErrorCode::kSystem},
      {EAGAIN, ErrorCode::kSystem},
  };
  for (const auto& [system_errno, code] : meanings) {
    const Error error = call_error(system_errno, "UFFDIO_WAKE");
    EXPECT_EQ(error.code, code) << strerror(system_errno);
    EXPECT_EQ(error.system_errno, system_errno);
    EXPECT_STREQ(error.what, "UFFDIO_WAKE");
  }
}

TEST(UffdProcess, AProcessThatIsGoneIsGone) {
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  const int file = ::memfd_create("gone", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(file, kPage), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const int uffd = test::open_userfaultfd();
    void* base = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const HostAddr address{reinterpret_cast<uint64_t>(base)};
    (void)register_range(uffd, address, kPage, kModes);
    iovec iov{&base, sizeof(base)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &uffd, sizeof(uffd));
    (void)::sendmsg(pair[1], &message, 0);
    ::_exit(0);
  }
  void* base = nullptr;
  iovec iov{&base, sizeof(base)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ASSERT_EQ(::recvmsg(pair[0], &message, MSG_CMSG_CLOEXEC), static_cast<ssize_t>(sizeof(base)));
  int uffd;
  std::memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(uffd));
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(::pwrite(file, "x", 1, 0), 1);
  const RangeOutcome result = continue_range(uffd, HostAddr{reinterpret_cast<uint64_t>(base)}, kPage);
  EXPECT_EQ(result.outcome, Outcome::kGone);
  EXPECT_EQ(result.system_errno, ESRCH);
  // The kernel returns ENOMEM here.
  for (const RangeOutcome& told :
       {unregister_range(uffd, HostAddr{reinterpret_cast<uint64_t>(base)}, kPage),
        register_range(uffd, HostAddr{reinterpret_cast<uint64_t>(base)}, kPage, kModes)}) {
    EXPECT_EQ(told.outcome, Outcome::kGone);
    EXPECT_EQ(told.system_errno, ESRCH);
  }
  for (const int fd : {uffd, file, pair[0], pair[1]}) ::close(fd);
}

TEST(UffdProbe, SaysWhatThisKernelCan) {
  const Support support = probe();
  ASSERT_TRUE(support.permitted) << strerror(support.system_errno);
  EXPECT_TRUE(support.minor_shmem);
  utsname kernel{};
  ASSERT_EQ(::uname(&kernel), 0);
  int major = 0, minor = 0;
  ASSERT_EQ(std::sscanf(kernel.release, "%d.%d", &major, &minor), 2);
  const bool since_6_7 = major > 6 || (major == 6 && minor >= 7);
  EXPECT_EQ(support.wp_async, since_6_7);
  EXPECT_EQ(support.pagemap_scan, since_6_7);
}

}  // namespace
}  // namespace vmigrate::uffd
