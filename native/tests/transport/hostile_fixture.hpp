#pragma once

// Shared by the tests of both hostile halves: raw frames made by hand, and a deadline for them.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "tests/transport/fixture.hpp"
#include "transport/credentials.hpp"
#include "transport/hello.hpp"
#include "transport/shm/provider.hpp"
#include "transport/socket.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {

inline Deadline soon() {
  return std::chrono::steady_clock::now() + kPatience;
}

template <typename T>
bool send_raw(int fd, const T& value) {
  return send_exactly(fd, std::as_bytes(std::span(&value, 1)), soon()).ok();
}

template <typename T>
bool receive_raw(int fd, T* value) {
  return receive_exactly(fd, std::as_writable_bytes(std::span(value, 1)), soon()).ok();
}

UniqueFd raw_connect(const Provider& provider, const Address& address);

/// True when the peer closes within `patience`. Data that it still sends is dropped.
bool closed_within(int fd, std::chrono::milliseconds patience);

wire::FrameHeader make_header(wire::FrameOp op, uint64_t key, uint64_t offset, uint32_t length);

/// A real listener. The test plays the requester by hand.
class HostileRequester : public testing::TestWithParam<const Provider*> {
 protected:
  void SetUp() override;
  /// Checks that an honest peer is still served and that the region is unchanged.
  void TearDown() override;
  UniqueFd raw() { return raw_connect(*GetParam(), listener_->address()); }
  UniqueFd admitted();
  /// A connection after its first hello, and the nonce of its challenge.
  UniqueFd challenged(const wire::Hello& hello, Nonce* source_nonce);
  /// The answer to what was sent on `fd` is a refusal with this status, and its end.
  void expect_refusal(int fd, wire::HelloStatus expected, uint64_t rejected_before);

  const Credentials credentials_ = make_credentials(1);
  TestMemory remote_{1 << 20};
  std::vector<std::byte> pristine_;
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
};

/// A real requester. The test plays the server by hand.
class HostileServer : public testing::TestWithParam<const Provider*> {
 protected:
  void SetUp() override {
    local_.fill(1);
    pristine_.assign(local_.base(), local_.base() + local_.length_bytes());
    Address address = listen_address(*GetParam());
    const auto to =
        GetParam() == &kTcpProvider ? tcp_socket_address(address) : unix_socket_address(address.host);
    listening_.reset(::socket(to.value().storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::bind(listening_.get(), to.value().get(), to.value().length), 0);
    ASSERT_EQ(::listen(listening_.get(), 8), 0);
    path_ = address.host;
    if (GetParam() == &kTcpProvider) {
      sockaddr_in bound{};
      socklen_t length = sizeof bound;
      ASSERT_EQ(::getsockname(listening_.get(), reinterpret_cast<sockaddr*>(&bound), &length), 0);
      address.port = ntohs(bound.sin_port);
    }
    address_ = address;
  }
  void TearDown() override {
    if (GetParam() == &kShmProvider) ::unlink(path_.c_str());
  }
  // Accepts the connection and answers the hello, up to its proof. Nothing is sent if the transcript is null.
  void serve_hello(const std::function<void(int, const Transcript*)>& answer, bool is_challenged = true) {
    acceptor_ = std::thread([this, answer, is_challenged] {
      peer_.reset(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      Transcript transcript{{}, random_nonce()};
      wire::Hello second{};
      if (!receive_raw(peer_.get(), &transcript.hello)) return;
      if (!is_challenged) return answer(peer_.get(), nullptr);
      if (!send_raw(peer_.get(), challenge(transcript.source_nonce)) || !receive_raw(peer_.get(), &second))
        return;
      Proof expected;
      EXPECT_TRUE(make_proof(make_credentials(1).token, End::kTarget, transcript, &expected));
      EXPECT_TRUE(equal_constant_time(expected, second.proof) && is_same_hello(transcript.hello, second));
      answer(peer_.get(), &transcript);
    });
  }
  // Says yes, as somebody who has `token`.
  static wire::HelloReply yes(const Transcript& transcript,
                              const SessionToken& token = make_credentials(1).token) {
    Agreed agreed;
    wire::HelloReply reply{};
    EXPECT_TRUE(accept_hello(token, transcript, &agreed, &reply));
    return reply;
  }
  void connect_honestly() {
    serve_hello([](int fd, const Transcript* transcript) { send_raw(fd, yes(*transcript)); });
    auto endpoint = connect(*GetParam(), address_, make_credentials(1));
    acceptor_.join();
    ASSERT_TRUE(endpoint.ok());
    endpoint_ = std::move(endpoint).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
  }
  void expect_connect_error(ErrorCode expected, const std::string& why) {
    const auto endpoint = connect(*GetParam(), address_, make_credentials(1));
    acceptor_.join();
    ASSERT_FALSE(endpoint.ok()) << why;
    EXPECT_EQ(endpoint.error().code, expected) << why;
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
    // Checks that nothing has changed outside the requested range.
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

}  // namespace vmigrate::transport
