// Tests the requester's half of the hello against servers that lie, or that do not have the token.

#include <sys/socket.h>

#include "tests/transport/hostile_fixture.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {
namespace {

class FalseSource : public HostileServer {};

TEST_P(FalseSource, WrongHelloRepliesAreErrors) {
  struct {
    wire::HelloReply reply;
    ErrorCode expected;
  } const cases[] = {
      {{wire::kHelloMagic ^ 1, wire::kProtocolVersion, 1, {}}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion + 1, 1, {}}, ErrorCode::kRefused},
      {{wire::kHelloMagic, wire::kOldHelloVersion, 1, {}}, ErrorCode::kRefused},
      {{wire::kHelloMagic, wire::kProtocolVersion, 0, {}}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion, 99, {}}, ErrorCode::kProtocol},
      {{wire::kHelloMagic, wire::kProtocolVersion, 4, {}}, ErrorCode::kRefused},
      {{wire::kHelloMagic, wire::kProtocolVersion, 5, {}}, ErrorCode::kRefused},
  };
  for (const bool is_challenged : {false, true}) {
    for (const auto& c : cases) {
      serve_hello([&](int fd, const Transcript*) { send_raw(fd, c.reply); }, is_challenged);
      expect_connect_error(c.expected, "status " + std::to_string(c.reply.status));
    }
    serve_hello([&](int fd, const Transcript*) { ::shutdown(fd, SHUT_RDWR); }, is_challenged);
    expect_connect_error(ErrorCode::kDisconnected, "closed");
    serve_hello([](int, const Transcript*) {}, is_challenged);
    const auto start = std::chrono::steady_clock::now();
    const auto silent = GetParam()->connect(address_, make_credentials(1), Channel::kDemand,
                                            std::chrono::milliseconds(200), {});
    acceptor_.join();
    ASSERT_FALSE(silent.ok());
    EXPECT_EQ(silent.error().code, ErrorCode::kTimeout);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  }
  serve_hello([](int fd, const Transcript*) { send_raw(fd, hello_reply(wire::HelloStatus::kOk)); }, false);
  expect_connect_error(ErrorCode::kProtocol, "OK without a challenge");
  serve_hello([](int fd, const Transcript*) { send_raw(fd, challenge(random_nonce())); });
  expect_connect_error(ErrorCode::kProtocol, "a second challenge");
}

// Nobody is believed who does not have the token: he could feed pages of his own choice to the guest.
TEST_P(FalseSource, AFalseSourceIsNotBelieved) {
  serve_hello([](int fd, const Transcript*) { send_raw(fd, hello_reply(wire::HelloStatus::kOk)); });
  expect_connect_error(ErrorCode::kRefused, "no proof");
  serve_hello([](int fd, const Transcript* transcript) {
    send_raw(fd, yes(*transcript, make_credentials(2).token));
  });
  expect_connect_error(ErrorCode::kRefused, "another token");
  serve_hello([](int fd, const Transcript* transcript) {
    wire::HelloReply reply = yes(*transcript);
    reply.value[15] ^= 1;
    send_raw(fd, reply);
  });
  expect_connect_error(ErrorCode::kRefused, "one wrong bit");
  serve_hello([](int fd, const Transcript* transcript) {
    Transcript other = *transcript;
    other.source_nonce[0] ^= 1;
    send_raw(fd, yes(other));
  });
  expect_connect_error(ErrorCode::kRefused, "of another connection");
  serve_hello([](int fd, const Transcript* transcript) {
    wire::HelloReply reply = hello_reply(wire::HelloStatus::kOk);
    Proof reflected;
    EXPECT_TRUE(make_proof(make_credentials(1).token, End::kTarget, *transcript, &reflected));
    std::copy(reflected.begin(), reflected.end(), reply.value);
    send_raw(fd, reply);
  });
  expect_connect_error(ErrorCode::kRefused, "the target's own proof, sent back");
}

INSTANTIATE_TEST_SUITE_P(Providers, FalseSource, testing::Values(&kTcpProvider, &kShmProvider),
                         [](const auto& suite) { return suite.param->name; });

}  // namespace
}  // namespace vmigrate::transport
