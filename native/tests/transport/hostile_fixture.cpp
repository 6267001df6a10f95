#include "tests/transport/hostile_fixture.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

namespace vmigrate::transport {

UniqueFd raw_connect(const Provider& provider, const Address& address) {
  const auto to = provider.host_is_path ? unix_socket_address(address.host) : tcp_socket_address(address);
  auto fd = connect_socket(to.value(), soon());
  EXPECT_TRUE(fd.ok());
  return std::move(fd).value();
}

/// True when the peer closes within `patience`. Data that it still sends is dropped.
bool closed_within(int fd, std::chrono::milliseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  std::vector<std::byte> sink(65536);
  for (;;) {
    const ssize_t count = ::recv(fd, sink.data(), sink.size(), MSG_DONTWAIT);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) return true;
    if (count < 0 && wait_for(fd, POLLIN, end) != 0) return false;
  }
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

void HostileRequester::SetUp() {
  remote_.fill(1);
  listener_ = must_listen(*GetParam());
  session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
  key_ = session_->expose(remote_.local(), Access::kReadWrite).value();
  pristine_.assign(remote_.base(), remote_.base() + remote_.length_bytes());
}

void HostileRequester::TearDown() {
  TestMemory local(65536);
  auto endpoint = connect(*GetParam(), listener_->address(), credentials_, Channel::kBulk);
  ASSERT_TRUE(endpoint.ok());
  const LocalId id = endpoint.value()->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint.value(), Operation{1, id, 0, key_, 0, 65536}), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.base(), pristine_.data(), 65536), 0);
  EXPECT_EQ(std::memcmp(remote_.base(), pristine_.data(), pristine_.size()), 0);
}

UniqueFd HostileRequester::admitted() {
  UniqueFd fd = raw();
  EXPECT_TRUE(say_hello(fd.get(), credentials_, Channel::kDemand, Security::kNone, soon()).ok());
  return fd;
}

UniqueFd HostileRequester::challenged(const wire::Hello& hello, Nonce* source_nonce) {
  UniqueFd fd = raw();
  wire::HelloReply reply{};
  EXPECT_TRUE(send_raw(fd.get(), hello) && receive_raw(fd.get(), &reply));
  EXPECT_EQ(reply.status, static_cast<uint16_t>(wire::HelloStatus::kChallenge));
  std::copy(std::begin(reply.value), std::end(reply.value), source_nonce->begin());
  return fd;
}

void HostileRequester::expect_refusal(int fd, wire::HelloStatus expected, uint64_t rejected_before) {
  wire::HelloReply reply{};
  ASSERT_TRUE(receive_raw(fd, &reply));
  EXPECT_EQ(reply.magic, wire::kHelloMagic);
  EXPECT_EQ(reply.version, wire::kProtocolVersion);
  EXPECT_EQ(reply.status, static_cast<uint16_t>(expected));
  EXPECT_EQ(Proof{}, std::to_array(reply.value)) << "a refusal says nothing else";
  EXPECT_TRUE(closed_within(fd, kPatience));
  EXPECT_TRUE(eventually([&] { return listener_->rejected_hellos() == rejected_before + 1; }));
}

}  // namespace vmigrate::transport
