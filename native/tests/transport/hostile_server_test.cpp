// Tests servers that lie. Whatever they answer, no byte is written outside the requested range.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdio>
#include <functional>
#include <random>
#include <thread>

#include "tests/transport/hostile_fixture.hpp"
#include "transport/credentials.hpp"
#include "transport/limits.hpp"
#include "transport/shm/frames.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {
namespace {

TEST_P(HostileServer, RepliesThatNobodyAskedFor) {
  connect_honestly();
  wire::FrameHeader reply{};
  reply.op = static_cast<uint8_t>(wire::FrameOp::kReadReply);
  reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
  reply.length = 4096;
  send_raw(peer_.get(), reply);
  const std::vector<std::byte> payload(4096, std::byte{0xee});
  (void)::send(peer_.get(), payload.data(), payload.size(), MSG_NOSIGNAL);
  expect_disconnect();
}

TEST_P(HostileServer, RefusalsOfWhatNobodyAskedFor) {
  connect_honestly();
  wire::FrameHeader reply{};
  reply.op = static_cast<uint8_t>(wire::FrameOp::kReadReply);
  reply.status = static_cast<uint8_t>(wire::OpStatus::kBadKey);
  reply.tag = 1ull << 8;
  send_raw(peer_.get(), reply);
  expect_disconnect();
}

TEST_P(HostileServer, MessagesThatAreTooLongOrEmpty) {
  for (const uint32_t length : {0u, wire::kMessageBytesMax + 1, UINT32_MAX}) {
    connect_honestly();
    wire::FrameHeader message{};
    message.op = static_cast<uint8_t>(wire::FrameOp::kMessage);
    message.length = length;
    send_raw(peer_.get(), message);
    expect_disconnect();
    endpoint_.reset();
    peer_.reset();
  }
}

TEST_P(HostileServer, SeededGarbageNeverWritesOutsideWhatWasAskedFor) {
  std::mt19937_64 random(99);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < end && !HasFailure()) {
    connect_honestly();
    const wire::FrameHeader request = post_read();
    std::vector<uint8_t> bytes(40'000);
    for (size_t at = 0; at + sizeof(wire::FrameHeader) < bytes.size();) {
      wire::FrameHeader header{};
      header.op = static_cast<uint8_t>(random() % 8 == 0 ? random() : 2 + 64 * (random() % 2));
      header.status = static_cast<uint8_t>(random() % 6);
      header.length = static_cast<uint32_t>(random() % 3 ? 4096 : random());
      header.tag = random() % 2 ? request.tag : random();
      if (random() % 4 == 0) reinterpret_cast<uint8_t*>(&header)[random() % 32] ^= 0x41;
      std::memcpy(bytes.data() + at, &header, sizeof header);
      at += sizeof header + random() % 5000;
    }
    (void)::send(peer_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    ::shutdown(peer_.get(), SHUT_RDWR);
    EXPECT_TRUE(wait_disconnected(*endpoint_));
    EXPECT_EQ(std::memcmp(local_.base(), pristine_.data(), 8192), 0);
    EXPECT_EQ(std::memcmp(local_.base() + 12288, pristine_.data() + 12288, pristine_.size() - 12288), 0);
    endpoint_.reset();
    peer_.reset();
  }
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileServer, testing::Values(&kTcpProvider, &kShmProvider),
                         [](const auto& suite) { return suite.param->name; });

class HostileTcpServer : public HostileServer {};

TEST_P(HostileTcpServer, RepliesThatAreNotWhatWasAskedFor) {
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.tag ^= 1; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.tag += 1ull << 8; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.tag = UINT64_MAX; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.length += 1; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.length -= 1; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.length = UINT32_MAX; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.length = 0; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.status = 0; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.status = 200; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.status = 2; });  // a refusal carries no bytes
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.status = 6; });  // nor does ABSENT
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.reserved = 1; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.key = 1; });
  expect_disconnect_after([](wire::FrameHeader& reply) { reply.offset = 1; });
  for (const uint8_t op : {uint8_t{0}, uint8_t{1}, uint8_t{3}, uint8_t{4}, uint8_t{6}, uint8_t{255}})
    expect_disconnect_after([op](wire::FrameHeader& reply) { reply.op = op; });
}

TEST_P(HostileTcpServer, OneReplyForTwo) {
  connect_honestly();
  const wire::FrameHeader request = post_read();
  wire::FrameHeader reply{};
  reply.op = static_cast<uint8_t>(wire::FrameOp::kReadReply);
  reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
  reply.length = request.length;
  reply.tag = request.tag;
  const std::vector<std::byte> payload(4096, std::byte{0xee});
  send_raw(peer_.get(), reply);
  ASSERT_TRUE(send_exactly(peer_.get(), payload, soon()).ok());
  Completion completion;
  ASSERT_TRUE(eventually([&] { return endpoint_->poll(std::span(&completion, 1)) == 1; }));
  EXPECT_EQ(completion.result, OpResult::kOk);
  EXPECT_EQ(std::memcmp(local_.base() + 8192, payload.data(), payload.size()), 0);
  send_raw(peer_.get(), reply);
  (void)::send(peer_.get(), payload.data(), payload.size(), MSG_NOSIGNAL);
  expect_disconnect();
}

// A reply to a WRITE whose bytes are still being sent is a lie. Believing it would return memory to the owner
// that is still being read.
TEST_P(HostileTcpServer, AReplyBeforeTheWriteHasLeft) {
  connect_honestly();
  TestMemory big(64 << 20);
  const LocalId id = endpoint_->register_local(big.local()).value();
  std::vector<Operation> writes;
  for (uint64_t i = 0; i < wire::kOutstandingOpsMax; ++i)
    writes.push_back(Operation{i, id, i << 20, RemoteKey{0, 5, 64 << 20}, i << 20, 1 << 20});
  ASSERT_EQ(endpoint_->write(writes).posted, writes.size());
  wire::FrameHeader first{};
  ASSERT_TRUE(receive_raw(peer_.get(), &first));
  // Tags of one endpoint count up in the high bytes. The last operation cannot have been sent yet.
  for (uint64_t slot = 0; slot < wire::kOutstandingOpsMax; ++slot) {
    wire::FrameHeader reply{};
    reply.op = static_cast<uint8_t>(wire::FrameOp::kWriteReply);
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.tag = uint64_t{wire::kOutstandingOpsMax} << 8 | (wire::kOutstandingOpsMax - 1 - slot);
    send_raw(peer_.get(), reply);
  }
  expect_disconnect();
}

TEST_P(HostileTcpServer, AbsentIsNoAnswerToAWrite) {
  connect_honestly();
  const Operation one = operation();
  ASSERT_EQ(endpoint_->write(std::span(&one, 1)).posted, 1u);
  wire::FrameHeader request{};
  ASSERT_TRUE(receive_raw(peer_.get(), &request));
  std::vector<std::byte> bytes(one.length_bytes);
  ASSERT_EQ(::recv(peer_.get(), bytes.data(), bytes.size(), MSG_WAITALL), static_cast<ssize_t>(bytes.size()));
  wire::FrameHeader reply{};
  reply.op = static_cast<uint8_t>(wire::FrameOp::kWriteReply);
  reply.status = static_cast<uint8_t>(wire::OpStatus::kAbsent);
  reply.tag = request.tag;
  send_raw(peer_.get(), reply);
  expect_disconnect();
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileTcpServer, testing::Values(&kTcpProvider),
                         [](const auto&) { return "tcp"; });

class HostileShmServer : public HostileServer {
 protected:
  // Answers the request for the key with `reply` and `passed_fd` (-1: none).
  void answer_map(const std::function<void(ShmMapReply&)>& spoil, int passed_fd, int copies = 1) {
    const wire::FrameHeader request = post_read();
    ASSERT_EQ(request.op, static_cast<uint8_t>(ShmOp::kMap));
    ShmMapReply reply{};
    reply.op = static_cast<uint8_t>(ShmOp::kMapReply);
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.access = static_cast<uint8_t>(Access::kRead);
    reply.key = 5;
    reply.length = 65536;
    spoil(reply);
    iovec part{&reply, sizeof reply};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))] = {};
    if (passed_fd >= 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(static_cast<size_t>(copies) * sizeof(int));
      cmsghdr* head = CMSG_FIRSTHDR(&message);
      head->cmsg_level = SOL_SOCKET;
      head->cmsg_type = SCM_RIGHTS;
      head->cmsg_len = CMSG_LEN(static_cast<size_t>(copies) * sizeof(int));
      for (int i = 0; i < copies; ++i)
        std::memcpy(CMSG_DATA(head) + static_cast<size_t>(i) * sizeof(int), &passed_fd, sizeof passed_fd);
    }
    ASSERT_EQ(::sendmsg(peer_.get(), &message, MSG_NOSIGNAL), static_cast<ssize_t>(sizeof reply));
  }
  void expect_refused(const std::function<void(ShmMapReply&)>& spoil, int passed_fd, int copies = 1) {
    const size_t fds = count_entries("/proc/self/fd");
    connect_honestly();
    answer_map(spoil, passed_fd, copies);
    expect_disconnect();
    endpoint_.reset();
    peer_.reset();
    EXPECT_EQ(count_entries("/proc/self/fd"), fds) << "a passed descriptor was kept";
  }
};

TEST_P(HostileShmServer, AnswersThatLieAboutTheFile) {
  const TestMemory memory(65536);
  const int fd = memory.fd();
  const auto nothing = [](ShmMapReply&) {};
  expect_refused(nothing, -1);
  expect_refused([](ShmMapReply& reply) { reply.length = 65537; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.length = 0; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.offset = 4096; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.offset = UINT64_MAX - 4096; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.length = UINT64_MAX; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.access = 0; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.access = 3; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.key = 6; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.status = 0; }, fd);
  expect_refused([](ShmMapReply& reply) { reply.status = 6; }, fd);  // ABSENT
  expect_refused([](ShmMapReply& reply) { reply.reserved[4] = 1; }, fd);
  expect_refused(nothing, fd, 40);
}

TEST_P(HostileShmServer, DescriptorsThatAreNoMemory) {
  const auto nothing = [](ShmMapReply&) {};
  int pipes[2];
  ASSERT_EQ(::pipe(pipes), 0);
  expect_refused(nothing, pipes[0]);  // reading it would wait for ever
  ::close(pipes[0]);
  ::close(pipes[1]);
  const UniqueFd disk(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  expect_refused(nothing, disk.get());
  const UniqueFd directory(::open("/dev/shm", O_RDONLY | O_CLOEXEC));
  expect_refused(nothing, directory.get());
}

TEST_P(HostileShmServer, AFileOpenedForReadingIsNotWrittenWhateverThePeerClaims) {
  TestMemory memory(65536);
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", memory.fd());
  const UniqueFd read_only(::open(path, O_RDONLY | O_CLOEXEC));
  connect_honestly();
  answer_map([](ShmMapReply& reply) { reply.access = static_cast<uint8_t>(Access::kReadWrite); },
             read_only.get());
  Completion completion;
  ASSERT_TRUE(eventually([&] { return endpoint_->poll(std::span(&completion, 1)) == 1; }));
  EXPECT_EQ(completion.result, OpResult::kOk);
  EXPECT_EQ(run_one(*endpoint_, operation(), true), OpResult::kNotAllowed);
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileShmServer, testing::Values(&kShmProvider),
                         [](const auto&) { return "shm"; });

}  // namespace
}  // namespace vmigrate::transport
