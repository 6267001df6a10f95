// Peers that lie, stall and flood. Whatever they do: no write outside what was asked for, no memory or thread
// without bound, and honest peers are served all the same.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>

#include "tests/transport_fixture.hpp"
#include "transport/credentials.hpp"
#include "transport/hello.hpp"
#include "transport/limits.hpp"
#include "transport/shm_frames.hpp"
#include "transport/socket.hpp"

namespace vmigrate::transport {
namespace {

Deadline soon() {
  return std::chrono::steady_clock::now() + kPatience;
}

UniqueFd raw_connect(Provider provider, const Address& address) {
  const auto to =
      provider == Provider::kTcp ? tcp_socket_address(address) : unix_socket_address(address.host);
  auto fd = connect_socket(to.value(), soon());
  EXPECT_TRUE(fd.ok());
  return std::move(fd).value();
}

template <typename T>
bool send_raw(int fd, const T& value) {
  return send_exactly(fd, std::as_bytes(std::span(&value, 1)), soon()).ok();
}

template <typename T>
bool receive_raw(int fd, T* value) {
  return receive_exactly(fd, std::as_writable_bytes(std::span(value, 1)), soon()).ok();
}

/// True when the peer closes within `patience`; what it still sends is dropped.
bool closed_within(int fd, std::chrono::milliseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  std::vector<std::byte> sink(65536);
  for (;;) {
    const ssize_t count = ::recv(fd, sink.data(), sink.size(), MSG_DONTWAIT);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) return true;
    if (count < 0 && wait_for(fd, POLLIN, end) != 0) return false;
  }
}

wire::Hello make_hello(const Credentials& credentials) {
  wire::Hello hello{};
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kProtocolVersion;
  hello.channel = 1;
  std::copy(credentials.session.begin(), credentials.session.end(), hello.session);
  std::copy(credentials.token.begin(), credentials.token.end(), hello.token);
  return hello;
}

wire::FrameHeader make_header(wire::FrameOp op, uint64_t key, uint64_t offset, uint32_t length) {
  wire::FrameHeader header{};
  header.op = static_cast<uint8_t>(op);
  header.length = length;
  header.tag = 77;
  header.key = key;
  header.offset = offset;
  return header;
}

// Allocates nothing: under AddressSanitizer freed memory stays resident for a while, and this is asked often.
size_t resident_bytes() {
  const UniqueFd statm(::open("/proc/self/statm", O_RDONLY | O_CLOEXEC));
  char text[128] = {};
  unsigned long total_pages = 0, resident_pages = 0;
  EXPECT_GT(::read(statm.get(), text, sizeof text - 1), 0);
  EXPECT_EQ(std::sscanf(text, "%lu %lu", &total_pages, &resident_pages), 2);
  return resident_pages * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

TEST(Credentials, ConstantTimeCompareComparesEveryByte) {
  std::array<uint8_t, 32> left{};
  for (size_t i = 0; i < left.size(); ++i) {
    auto right = left;
    EXPECT_TRUE(equal_constant_time(left, right));
    right[i] = 0x80;
    EXPECT_FALSE(equal_constant_time(left, right));
  }
  EXPECT_FALSE(equal_constant_time(left, std::span(left).first(31)));
  EXPECT_NE(random_key(), random_key());
}

/// A real listener; the test plays the requester by hand.
class HostileRequester : public testing::TestWithParam<Provider> {
 protected:
  void SetUp() override {
    remote_.fill(1);
    listener_ = must_listen(GetParam());
    session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
    key_ = session_->expose(remote_.local(), Access::kReadWrite).value();
    pristine_.assign(remote_.base(), remote_.base() + remote_.length_bytes());
  }
  // Whatever happened, an honest peer is served and the region is what it was.
  void TearDown() override {
    TestMemory local(65536);
    auto endpoint = connect(GetParam(), listener_->address(), credentials_, Channel::kBulk);
    ASSERT_TRUE(endpoint.ok());
    const LocalId id = endpoint.value()->register_local(local.local()).value();
    EXPECT_EQ(run_one(*endpoint.value(), Operation{1, id, 0, key_, 0, 65536}), OpResult::kOk);
    EXPECT_EQ(std::memcmp(local.base(), pristine_.data(), 65536), 0);
    EXPECT_EQ(std::memcmp(remote_.base(), pristine_.data(), pristine_.size()), 0);
  }
  UniqueFd raw() { return raw_connect(GetParam(), listener_->address()); }
  UniqueFd admitted() {
    UniqueFd fd = raw();
    wire::HelloReply reply{};
    EXPECT_TRUE(send_raw(fd.get(), make_hello(credentials_)) && receive_raw(fd.get(), &reply));
    EXPECT_EQ(reply.status, static_cast<uint16_t>(wire::HelloStatus::kOk));
    return fd;
  }
  void expect_status(const wire::Hello& hello, wire::HelloStatus expected) {
    const uint64_t rejected_before = listener_->rejected_hellos();
    const UniqueFd fd = raw();
    wire::HelloReply reply{};
    ASSERT_TRUE(send_raw(fd.get(), hello) && receive_raw(fd.get(), &reply));
    EXPECT_EQ(reply.magic, wire::kHelloMagic);
    EXPECT_EQ(reply.version, wire::kProtocolVersion);
    EXPECT_EQ(reply.status, static_cast<uint16_t>(expected));
    EXPECT_TRUE(closed_within(fd.get(), kPatience));
    EXPECT_TRUE(eventually([&] { return listener_->rejected_hellos() == rejected_before + 1; }));
  }
  void expect_closed_after(const wire::FrameHeader& header) {
    const UniqueFd fd = admitted();
    ASSERT_TRUE(send_raw(fd.get(), header));
    EXPECT_TRUE(closed_within(fd.get(), kPatience))
        << "op " << int{header.op} << " length " << header.length << " reserved " << header.reserved;
  }

  const Credentials credentials_ = make_credentials(1);
  TestMemory remote_{1 << 20};
  std::vector<std::byte> pristine_;
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
};

TEST_P(HostileRequester, HellosThatAreWrongAreAnsweredAndClosed) {
  const wire::Hello right = make_hello(credentials_);
  wire::Hello hello = right;
  hello.magic ^= 1;
  expect_status(hello, wire::HelloStatus::kBadMagic);
  hello = right;
  hello.version = wire::kProtocolVersion + 1;
  expect_status(hello, wire::HelloStatus::kBadVersion);
  for (size_t i = 0; i < sizeof hello.token; i += 31) {
    hello = right;
    hello.token[i] ^= 0x80;
    expect_status(hello, wire::HelloStatus::kRefused);
  }
  hello = right;
  hello.session[15] ^= 1;
  expect_status(hello, wire::HelloStatus::kRefused);
  for (const uint16_t channel : {uint16_t{0}, uint16_t{3}, uint16_t{0xffff}}) {
    hello = right;
    hello.channel = channel;
    expect_status(hello, wire::HelloStatus::kRefused);
  }
}

TEST_P(HostileRequester, AHelloInPiecesIsAHello) {
  const UniqueFd fd = raw();
  const wire::Hello hello = make_hello(credentials_);
  const auto bytes = std::as_bytes(std::span(&hello, 1));
  for (size_t i = 0; i < bytes.size(); i += 7) {
    ASSERT_TRUE(send_exactly(fd.get(), bytes.subspan(i, std::min<size_t>(7, bytes.size() - i)), soon()).ok());
    ::usleep(2000);
  }
  wire::HelloReply reply{};
  ASSERT_TRUE(receive_raw(fd.get(), &reply));
  EXPECT_EQ(reply.status, static_cast<uint16_t>(wire::HelloStatus::kOk));
}

TEST_P(HostileRequester, HalfAHelloThenSilenceIsClosedInTime) {
  const UniqueFd silent = raw();
  const UniqueFd half = raw();
  const wire::Hello hello = make_hello(credentials_);
  const auto bytes = std::as_bytes(std::span(&hello, 1));
  ASSERT_TRUE(send_exactly(half.get(), bytes.first(28), soon()).ok());
  const UniqueFd drip = raw();
  std::thread dripper([&] {
    for (size_t i = 0; i < 50; ++i) {
      if (::send(drip.get(), bytes.data() + i, 1, MSG_NOSIGNAL) != 1) return;
      ::usleep(100'000);
    }
  });
  const auto limit = std::chrono::milliseconds(wire::kHelloTimeoutMs + 1500);
  EXPECT_TRUE(closed_within(half.get(), limit));
  EXPECT_TRUE(closed_within(silent.get(), limit));
  EXPECT_TRUE(closed_within(drip.get(), limit)) << "dripping bytes must not buy time";
  dripper.join();
  EXPECT_GE(listener_->rejected_hellos(), 3u);
}

TEST_P(HostileRequester, AFloodOfSilentConnectionsDoesNotKeepAnHonestOneOut) {
  std::vector<UniqueFd> flood;
  for (int i = 0; i < 200; ++i) flood.push_back(raw());
  const auto start = std::chrono::steady_clock::now();
  const UniqueFd honest = admitted();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(wire::kHelloTimeoutMs / 2));
  EXPECT_TRUE(
      eventually([&] { return listener_->rejected_hellos() >= flood.size() - wire::kHelloPendingMax; }));
}

TEST_P(HostileRequester, FramesThatMakeNoSenseEndTheConnection) {
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

TEST_P(HostileRequester, ATruncatedFrameHarmsNobody) {
  for (const size_t length : {1u, 16u, 31u}) {
    UniqueFd fd = admitted();
    const wire::FrameHeader header = make_header(wire::FrameOp::kWrite, key_.key, 0, 4096);
    ASSERT_TRUE(send_exactly(fd.get(), std::as_bytes(std::span(&header, 1)).first(length), soon()).ok());
  }
  if (GetParam() == Provider::kTcp) {
    // Nor does a WRITE whose bytes never come: nothing of its range is touched.
    UniqueFd fd = admitted();
    ASSERT_TRUE(send_raw(fd.get(), make_header(wire::FrameOp::kWrite, key_.key, 0, 4096)));
    const std::vector<std::byte> some(4000);
    ASSERT_TRUE(send_exactly(fd.get(), some, soon()).ok());
  }
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(HostileRequester, SeededGarbageNeverHurtsTheServer) {
  std::mt19937_64 random(20240501);
  // Only reads: a write that happens to be right is allowed to write.
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
        // Nearly right, so that the fuzz gets past the first check.
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

INSTANTIATE_TEST_SUITE_P(Providers, HostileRequester, testing::Values(Provider::kTcp, Provider::kShm),
                         [](const auto& suite) { return suite.param == Provider::kTcp ? "tcp" : "shm"; });

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
  ::usleep(50'000);
  EXPECT_EQ(count_entries("/proc/self/fd"), before);
}

INSTANTIATE_TEST_SUITE_P(Providers, ShmPassing, testing::Values(Provider::kShm),
                         [](const auto&) { return "shm"; });

class TcpFlood : public HostileRequester {};

// The server has one reply in hand and blocks on its own socket; requests pile up in the kernel and then at
// the flooder. After kReplyTimeoutMs it is disconnected.
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

INSTANTIATE_TEST_SUITE_P(Providers, TcpFlood, testing::Values(Provider::kTcp),
                         [](const auto&) { return "tcp"; });

/// A real requester; the test plays the server by hand.
class HostileServer : public testing::TestWithParam<Provider> {
 protected:
  void SetUp() override {
    local_.fill(1);
    pristine_.assign(local_.base(), local_.base() + local_.length_bytes());
    Address address = listen_address(GetParam());
    const auto to =
        GetParam() == Provider::kTcp ? tcp_socket_address(address) : unix_socket_address(address.host);
    listening_.reset(::socket(to.value().storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::bind(listening_.get(), to.value().get(), to.value().length), 0);
    ASSERT_EQ(::listen(listening_.get(), 8), 0);
    path_ = address.host;
    if (GetParam() == Provider::kTcp) {
      sockaddr_in bound{};
      socklen_t length = sizeof bound;
      ASSERT_EQ(::getsockname(listening_.get(), reinterpret_cast<sockaddr*>(&bound), &length), 0);
      address.port = ntohs(bound.sin_port);
    }
    address_ = address;
  }
  void TearDown() override {
    if (GetParam() == Provider::kShm) ::unlink(path_.c_str());
  }
  // Accepts and answers the hello as told.
  void serve_hello(const std::function<void(int)>& answer) {
    acceptor_ = std::thread([this, answer] {
      peer_.reset(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      wire::Hello hello{};
      if (receive_raw(peer_.get(), &hello)) answer(peer_.get());
    });
  }
  void connect_honestly() {
    serve_hello([](int fd) { send_raw(fd, hello_reply(wire::HelloStatus::kOk)); });
    auto endpoint = connect(GetParam(), address_, make_credentials(1));
    acceptor_.join();
    ASSERT_TRUE(endpoint.ok());
    endpoint_ = std::move(endpoint).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
  }
  Operation operation(uint32_t length_bytes = 4096) const {
    return Operation{9, local_id_, 8192, RemoteKey{0, 5, 1 << 20}, 0, length_bytes};
  }
  // Posts one READ of 4 KiB at 8192 and returns the request as it arrived.
  wire::FrameHeader post_read() {
    const Operation one = operation();
    EXPECT_EQ(endpoint_->read(std::span(&one, 1)).posted, 1u);
    wire::FrameHeader request{};
    EXPECT_TRUE(receive_raw(peer_.get(), &request));
    return request;
  }
  void expect_disconnect() {
    std::vector<Completion> completions;
    EXPECT_TRUE(eventually([&] {
      Completion batch[8];
      const size_t count = endpoint_->poll(batch);
      completions.insert(completions.end(), batch, batch + count);
      return endpoint_->disconnected();
    }));
    for (const Completion& completion : completions) EXPECT_EQ(completion.result, OpResult::kDisconnected);
    // Outside the range that was asked for nothing has changed.
    EXPECT_EQ(std::memcmp(local_.base(), pristine_.data(), 8192), 0);
    EXPECT_EQ(std::memcmp(local_.base() + 12288, pristine_.data() + 12288, pristine_.size() - 12288), 0);
  }
  void expect_disconnect_after(const std::function<void(wire::FrameHeader&)>& spoil) {
    connect_honestly();
    const wire::FrameHeader request = post_read();
    wire::FrameHeader reply{};
    reply.op = static_cast<uint8_t>(wire::FrameOp::kReadReply);
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.length = request.length;
    reply.tag = request.tag;
    spoil(reply);
    send_raw(peer_.get(), reply);
    const std::vector<std::byte> payload(16384, std::byte{0xee});
    (void)::send(peer_.get(), payload.data(), payload.size(), MSG_NOSIGNAL);
    expect_disconnect();
    endpoint_.reset();
    peer_.reset();
  }

  TestMemory local_{65536};
  std::vector<std::byte> pristine_;
  UniqueFd listening_;
  UniqueFd peer_;
  std::string path_;
  Address address_;
  std::thread acceptor_;
  std::unique_ptr<Endpoint> endpoint_;
  LocalId local_id_{};
};

TEST_P(HostileServer, WrongHelloRepliesAreErrors) {
  struct {
    wire::HelloReply reply;
    ErrorCode expected;
  } const cases[] = {
      {{wire::kHelloMagic ^ 1, wire::kProtocolVersion, 1}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion + 1, 1}, ErrorCode::kRefused},
      {{wire::kHelloMagic, wire::kProtocolVersion, 0}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion, 99}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion, 5}, ErrorCode::kRefused},
  };
  for (const auto& c : cases) {
    serve_hello([&](int fd) { send_raw(fd, c.reply); });
    const auto endpoint = connect(GetParam(), address_, make_credentials(1));
    acceptor_.join();
    ASSERT_FALSE(endpoint.ok());
    EXPECT_EQ(endpoint.error().code, c.expected);
  }
  serve_hello([&](int fd) { ::shutdown(fd, SHUT_RDWR); });
  const auto closed = connect(GetParam(), address_, make_credentials(1));
  acceptor_.join();
  ASSERT_FALSE(closed.ok());
  EXPECT_EQ(closed.error().code, ErrorCode::kDisconnected);
  serve_hello([](int) {});
  const auto start = std::chrono::steady_clock::now();
  const auto silent =
      GetParam() == Provider::kTcp
          ? connect_tcp(address_, make_credentials(1), Channel::kDemand, std::chrono::milliseconds(200))
          : connect_shm(address_, make_credentials(1), Channel::kDemand, std::chrono::milliseconds(200));
  acceptor_.join();
  ASSERT_FALSE(silent.ok());
  EXPECT_EQ(silent.error().code, ErrorCode::kTimeout);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
}

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

INSTANTIATE_TEST_SUITE_P(Providers, HostileServer, testing::Values(Provider::kTcp, Provider::kShm),
                         [](const auto& suite) { return suite.param == Provider::kTcp ? "tcp" : "shm"; });

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

// The reply to a WRITE whose bytes are still on their way is a lie; believing it would hand memory back that
// is still being read.
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
  // Tags of one endpoint count up in the high bytes; the last operation cannot have left yet.
  for (uint64_t slot = 0; slot < wire::kOutstandingOpsMax; ++slot) {
    wire::FrameHeader reply{};
    reply.op = static_cast<uint8_t>(wire::FrameOp::kWriteReply);
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.tag = uint64_t{wire::kOutstandingOpsMax} << 8 | (wire::kOutstandingOpsMax - 1 - slot);
    send_raw(peer_.get(), reply);
  }
  expect_disconnect();
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileTcpServer, testing::Values(Provider::kTcp),
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

INSTANTIATE_TEST_SUITE_P(Providers, HostileShmServer, testing::Values(Provider::kShm),
                         [](const auto&) { return "shm"; });

}  // namespace
}  // namespace vmigrate::transport
