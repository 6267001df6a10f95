// Tests requesters that were admitted and then lie, stall and flood. Whatever they do, they use no unbounded
// memory or threads, and honest requesters are still served.

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <thread>

#include "tests/transport/hostile_fixture.hpp"
#include "transport/credentials.hpp"
#include "transport/limits.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {
namespace {

// Allocates nothing: under AddressSanitizer freed memory stays resident for a while, and this function is
// called often.
size_t resident_bytes() {
  const UniqueFd statm(::open("/proc/self/statm", O_RDONLY | O_CLOEXEC));
  char text[128] = {};
  unsigned long total_pages = 0, resident_pages = 0;
  EXPECT_GT(::read(statm.get(), text, sizeof text - 1), 0);
  EXPECT_EQ(std::sscanf(text, "%lu %lu", &total_pages, &resident_pages), 2);
  return resident_pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

class HostileFrames : public HostileRequester {
 protected:
  void expect_closed_after(const wire::FrameHeader& header) {
    const UniqueFd fd = admitted();
    ASSERT_TRUE(send_raw(fd.get(), header));
    EXPECT_TRUE(closed_within(fd.get(), kPatience))
        << "op " << int{header.op} << " length " << header.length << " reserved " << header.reserved;
  }
};

TEST_P(HostileFrames, FramesThatMakeNoSenseEndTheConnection) {
  using wire::FrameOp;
  const uint64_t key = key_.key;
  for (const int op : {0, 2, 4, 6, 64, 66, 67, 255}) {
    wire::FrameHeader header = make_header(FrameOp::kRead, key, 0, 4096);
    header.op = static_cast<uint8_t>(op);
    expect_closed_after(header);
  }
  wire::FrameHeader header = make_header(FrameOp::kRead, key, 0, 4096);
  header.reserved = 1;
  expect_closed_after(header);
  header = make_header(FrameOp::kRead, key, 0, 4096);
  header.status = 1;
  expect_closed_after(header);
  for (const uint32_t length : {wire::kTransferBytesMax + 1, UINT32_MAX}) {
    expect_closed_after(make_header(FrameOp::kRead, key, 0, length));
    expect_closed_after(make_header(FrameOp::kWrite, key, 0, length));
  }
  for (const uint32_t length : {0u, wire::kMessageBytesMax + 1, UINT32_MAX}) {
    header = {};
    header.op = static_cast<uint8_t>(FrameOp::kMessage);
    header.length = length;
    expect_closed_after(header);
  }
  header = {};
  header.op = static_cast<uint8_t>(FrameOp::kMessage);
  header.length = 8;
  header.tag = 1;
  expect_closed_after(header);
}

TEST_P(HostileFrames, ATruncatedFrameHarmsNobody) {
  for (const size_t length : {1u, 16u, 31u}) {
    UniqueFd fd = admitted();
    const wire::FrameHeader header = make_header(wire::FrameOp::kWrite, key_.key, 0, 4096);
    ASSERT_TRUE(send_exactly(fd.get(), std::as_bytes(std::span(&header, 1)).first(length), soon()).ok());
  }
  if (GetParam() == &kTcpProvider) {
    // Nor does a WRITE whose bytes never come: nothing of its range is touched.
    UniqueFd fd = admitted();
    ASSERT_TRUE(send_raw(fd.get(), make_header(wire::FrameOp::kWrite, key_.key, 0, 4096)));
    const std::vector<std::byte> some(4000);
    ASSERT_TRUE(send_exactly(fd.get(), some, soon()).ok());
  }
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(HostileFrames, SeededGarbageNeverHurtsTheServer) {
  std::mt19937_64 random(20240501);
  // Fuzzes only reads: a write that happens to be valid is allowed to write.
  session_.reset();
  session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
  key_ = session_->expose(remote_.local(), Access::kRead).value();
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  uint64_t connections = 0;
  while (std::chrono::steady_clock::now() < end) {
    const UniqueFd fd = admitted();
    ++connections;
    for (int i = 0; i < 20; ++i) {
      wire::FrameHeader header{};
      auto* words = reinterpret_cast<uint8_t*>(&header);
      if (random() % 4 == 0) {
        for (size_t byte = 0; byte < sizeof header; ++byte) words[byte] = static_cast<uint8_t>(random());
      } else {
        // Almost valid, so that the fuzz gets past the first check.
        header.op = static_cast<uint8_t>(1 + random() % 6);
        header.length = static_cast<uint32_t>(random() % 3 == 0 ? random() : random() % 8192);
        header.tag = random();
        header.key = random() % 2 ? key_.key : random();
        header.offset = random() % 3 == 0 ? random() : random() % (2 << 20);
        if (random() % 4 == 0) words[random() % sizeof header] ^= static_cast<uint8_t>(1 << random() % 8);
      }
      if (::send(fd.get(), &header, 1 + random() % sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) break;
    }
    if (random() % 2) (void)closed_within(fd.get(), std::chrono::milliseconds(1));
  }
  EXPECT_GT(connections, 5u);
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileFrames, testing::Values(&kTcpProvider, &kShmProvider),
                         [](const auto& suite) { return suite.param->name; });

class ShmPassing : public HostileRequester {};

TEST_P(ShmPassing, PassedDescriptorsAreNotKept) {
  const UniqueFd fd = admitted();
  const size_t before = count_entries("/proc/self/fd");
  wire::FrameHeader header{};
  header.op = static_cast<uint8_t>(wire::FrameOp::kMessage);
  header.length = 4;
  char bytes[36] = {};
  std::memcpy(bytes, &header, sizeof header);
  for (int i = 0; i < 50; ++i) {
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    iovec part{bytes, sizeof bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    const int passed = remote_.fd();
    std::memcpy(CMSG_DATA(head), &passed, sizeof passed);
    ASSERT_EQ(::sendmsg(fd.get(), &message, MSG_NOSIGNAL), static_cast<ssize_t>(sizeof bytes));
  }
  // Nonsense follows them: the server closes when it has read them all.
  ASSERT_TRUE(send_raw(fd.get(), make_header(static_cast<wire::FrameOp>(255), 0, 0, 0)));
  ASSERT_TRUE(closed_within(fd.get(), kPatience));
  EXPECT_TRUE(eventually([&] { return count_entries("/proc/self/fd") < before; })) << "descriptors were kept";
}

INSTANTIATE_TEST_SUITE_P(Providers, ShmPassing, testing::Values(&kShmProvider),
                         [](const auto&) { return "shm"; });

class TcpFlood : public HostileRequester {};

// The server holds one reply and blocks on its own socket. Requests pile up in the kernel and then at the
// flooder. After kReplyTimeoutMs the flooder is disconnected.
TEST_P(TcpFlood, ReadsWhoseRepliesNobodyTakesCostNoMemory) {
  const UniqueFd fd = admitted();
  const size_t before_bytes = resident_bytes();
  const std::vector<wire::FrameHeader> requests(
      128, make_header(wire::FrameOp::kRead, key_.key, 0, wire::kTransferBytesMax));
  const auto start = std::chrono::steady_clock::now();
  bool closed = false;
  while (!closed &&
         std::chrono::steady_clock::now() - start < std::chrono::milliseconds(3 * kReplyTimeoutMs)) {
    const ssize_t sent =
        ::send(fd.get(), requests.data(), requests.size() * sizeof requests[0], MSG_NOSIGNAL | MSG_DONTWAIT);
    closed = sent < 0 && errno != EAGAIN;
    if (sent < 0) ::usleep(10'000);
    ASSERT_LT(resident_bytes(), before_bytes + (16 << 20));
  }
  EXPECT_TRUE(closed);
  EXPECT_GT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(kReplyTimeoutMs / 2));
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(TcpFlood, AFloodedSessionEndsAtOnceAllTheSame) {
  const UniqueFd fd = admitted();
  const std::vector<wire::FrameHeader> requests(
      64, make_header(wire::FrameOp::kRead, key_.key, 0, wire::kTransferBytesMax));
  (void)::send(fd.get(), requests.data(), requests.size() * sizeof requests[0], MSG_NOSIGNAL);
  ::usleep(200'000);
  const auto start = std::chrono::steady_clock::now();
  session_.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(kReplyTimeoutMs / 2));
  session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
  key_ = session_->expose(remote_.local(), Access::kReadWrite).value();
}

INSTANTIATE_TEST_SUITE_P(Providers, TcpFlood, testing::Values(&kTcpProvider),
                         [](const auto&) { return "tcp"; });

}  // namespace
}  // namespace vmigrate::transport
