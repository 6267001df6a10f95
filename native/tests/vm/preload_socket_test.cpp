// A process that may open no more files gets a record without its descriptors, and the record says so.

#include "vm/preload_socket.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

namespace vmigrate::pager {
namespace {

void send_with_descriptors(int socket, int descriptor, size_t count) {
  char byte = 'x';
  iovec body{&byte, sizeof byte};
  alignas(cmsghdr) char control[CMSG_SPACE(32 * sizeof(int))] = {};
  msghdr record{};
  record.msg_iov = &body;
  record.msg_iovlen = 1;
  record.msg_control = control;
  record.msg_controllen = CMSG_SPACE(count * sizeof(int));
  cmsghdr* rights = CMSG_FIRSTHDR(&record);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(count * sizeof(int));
  for (size_t i = 0; i < count; i++)
    std::memcpy(CMSG_DATA(rights) + i * sizeof(int), &descriptor, sizeof descriptor);
  ASSERT_EQ(::sendmsg(socket, &record, MSG_NOSIGNAL), 1);
}

class PreloadSocketTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int pair[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    ours_.reset(pair[0]);
    theirs_.reset(pair[1]);
  }

  UniqueFd ours_;
  UniqueFd theirs_;
};

TEST_F(PreloadSocketTest, TheLimitOfOpenFilesIsToldFromAPeerThatSendsTooMuch) {
  std::byte buffer[16];
  send_with_descriptors(theirs_.get(), theirs_.get(), wire::kPreloadDescriptorsMax + 1);
  const auto too_many = receive_record(ours_.get(), buffer);
  ASSERT_TRUE(too_many.ok());
  EXPECT_TRUE(too_many.value().is_cut);
  EXPECT_FALSE(too_many.value().lacks_descriptors);

  send_with_descriptors(theirs_.get(), theirs_.get(), 2);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit low = before;
  const UniqueFd next(::dup(ours_.get()));
  // One more descriptor fits, the second one does not.
  low.rlim_cur = static_cast<rlim_t>(next.get()) + 2;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  const auto cut = receive_record(ours_.get(), buffer);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  ASSERT_TRUE(cut.ok());
  EXPECT_TRUE(cut.value().is_cut);
  EXPECT_TRUE(cut.value().lacks_descriptors);
  EXPECT_EQ(cut.value().descriptors.size(), 1u);
}

}  // namespace
}  // namespace vmigrate::pager
