// Tests the hello against peers that do not have the token: guesses, recordings, silence and floods.

#include <sys/socket.h>

#include <algorithm>
#include <thread>

#include "tests/transport/hostile_fixture.hpp"
#include "transport/credentials.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {
namespace {

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
  EXPECT_NE(random_nonce(), random_nonce());
}

// The same figures come from Python's hmac and hashlib, by the description in docs/PROTOCOL.md.
TEST(Proof, IsWhatTheProtocolSays) {
  Transcript transcript;
  transcript.hello.magic = wire::kHelloMagic;
  transcript.hello.version = 3;
  transcript.hello.channel = 2;
  transcript.hello.security = 2;
  for (uint8_t i = 0; i < 16; ++i) {
    transcript.hello.session[i] = i;
    transcript.hello.nonce[i] = static_cast<uint8_t>(0x10 + i);
    transcript.source_nonce[i] = static_cast<uint8_t>(0x20 + i);
  }
  SessionToken token;
  for (uint8_t i = 0; i < token.size(); ++i) token[i] = static_cast<uint8_t>(0x40 + i);
  const auto hex = [](std::span<const uint8_t> bytes) {
    std::string text;
    char two[3];
    for (const uint8_t byte : bytes) {
      std::snprintf(two, sizeof two, "%02x", byte);
      text += two;
    }
    return text;
  };
  Proof target, source;
  ASSERT_TRUE(make_proof(token, End::kTarget, transcript, &target));
  ASSERT_TRUE(make_proof(token, End::kSource, transcript, &source));
  EXPECT_EQ(hex(target), "2ebdf32f0dba30fc9f8a1ea9e74588dc");
  EXPECT_EQ(hex(source), "9d157d2f8493a1c98e7d1ebc2906fe84");
  FrameKey key;
  ASSERT_TRUE(derive_key(token, End::kTarget, "frames", transcript, &key));
  EXPECT_EQ(hex(key), "f21ab4af7c9e6b0ca266aea7fed6deaf227e01d78d94353c03f11c81372f5e8b");
}

class HostileHello : public HostileRequester {
 protected:
  void expect_status(const wire::Hello& hello, wire::HelloStatus expected) {
    const uint64_t rejected_before = listener_->rejected_hellos();
    const UniqueFd fd = raw();
    ASSERT_TRUE(send_raw(fd.get(), hello));
    expect_refusal(fd.get(), expected, rejected_before);
  }
  // Answers a challenge for `greeting` by its second hello, as `spoil` changes it.
  void expect_refused_answer(Greeting greeting, const std::function<void(wire::Hello&)>& spoil) {
    const uint64_t rejected_before = listener_->rejected_hellos();
    Nonce nonce;
    const UniqueFd fd = challenged(greeting.hello(), &nonce);
    ASSERT_TRUE(greeting.take_challenge(challenge(nonce)).ok());
    wire::Hello second = greeting.hello();
    spoil(second);
    ASSERT_TRUE(send_raw(fd.get(), second));
    expect_refusal(fd.get(), wire::HelloStatus::kRefused, rejected_before);
  }
  Greeting greeting(Channel channel = Channel::kDemand) const {
    return Greeting(credentials_, channel, Security::kNone);
  }
};

TEST_P(HostileHello, FirstHellosThatAreWrongAreAnsweredAndClosed) {
  const wire::Hello right = greeting().hello();
  wire::Hello hello = right;
  hello.magic ^= 1;
  expect_status(hello, wire::HelloStatus::kBadMagic);
  for (const uint16_t version : {0, 1, wire::kProtocolVersion + 1}) {
    hello = right;
    hello.version = version;
    expect_status(hello, wire::HelloStatus::kBadVersion);
  }
  for (const uint8_t channel : {0, 3, 255}) {
    hello = right;
    hello.channel = channel;
    expect_status(hello, wire::HelloStatus::kRefused);
  }
  for (const uint8_t security : {0, 4, 255}) {
    hello = right;
    hello.security = security;
    expect_status(hello, wire::HelloStatus::kRefused);
  }
  hello = right;
  hello.proof[15] = 1;
  expect_status(hello, wire::HelloStatus::kRefused);
}

TEST_P(HostileHello, AnswersThatAreWrongAreRefused) {
  const auto nothing = [](wire::Hello&) {};
  for (size_t i = 0; i < wire::kHelloProofBytes; ++i)
    expect_refused_answer(greeting(), [i](wire::Hello& hello) { hello.proof[i] ^= 0x80; });
  // A proof is good for what was said first, and for nothing else.
  expect_refused_answer(greeting(), [](wire::Hello& hello) { hello.channel = 2; });
  expect_refused_answer(greeting(), [](wire::Hello& hello) { hello.security = 2; });
  expect_refused_answer(greeting(), [](wire::Hello& hello) { hello.session[15] ^= 1; });
  expect_refused_answer(greeting(), [](wire::Hello& hello) { hello.nonce[0] ^= 1; });
  expect_refused_answer(greeting(), [](wire::Hello& hello) { hello.version = wire::kOldHelloVersion; });
  Credentials other = credentials_;
  other.token[7] ^= 1;
  expect_refused_answer(Greeting(other, Channel::kDemand, Security::kNone), nothing);
  other = credentials_;
  other.session[0] ^= 1;
  expect_refused_answer(Greeting(other, Channel::kDemand, Security::kNone), nothing);
  expect_refused_answer(Greeting(Credentials{}, Channel::kDemand, Security::kNone), nothing);
}

// A stranger who knows no session gets the same answer as one who does.
TEST_P(HostileHello, TheChallengeSaysNothingOfSessions) {
  Nonce known, unknown, again;
  (void)challenged(greeting().hello(), &known);
  (void)challenged(Greeting(Credentials{}, Channel::kDemand, Security::kNone).hello(), &unknown);
  (void)challenged(greeting().hello(), &again);
  EXPECT_NE(known, again);
  EXPECT_NE(known, unknown);
}

TEST_P(HostileHello, ARecordedHandshakeOpensNothing) {
  Greeting honest = greeting();
  Nonce nonce;
  const UniqueFd first = challenged(honest.hello(), &nonce);
  const wire::Hello first_hello = honest.hello();
  ASSERT_TRUE(honest.take_challenge(challenge(nonce)).ok());
  const wire::Hello second_hello = honest.hello();
  // The proof while its own connection is still waiting for it, and after it was used.
  for (int i = 0; i < 2; ++i) {
    const uint64_t rejected_before = listener_->rejected_hellos();
    Nonce other_nonce;
    const UniqueFd replayed = challenged(first_hello, &other_nonce);
    EXPECT_NE(other_nonce, nonce);
    ASSERT_TRUE(send_raw(replayed.get(), second_hello));
    expect_refusal(replayed.get(), wire::HelloStatus::kRefused, rejected_before);
    if (i > 0) break;
    ASSERT_TRUE(send_raw(first.get(), second_hello));
    wire::HelloReply reply{};
    ASSERT_TRUE(receive_raw(first.get(), &reply));
    EXPECT_TRUE(honest.take_reply(reply).ok());
  }
  expect_status(second_hello, wire::HelloStatus::kRefused);
}

TEST_P(HostileHello, AProofForAnotherSessionOpensNothing) {
  const auto other = listener_->expose_session(make_credentials(2), nullptr, nullptr).value();
  Credentials mixed = make_credentials(2);
  mixed.session = credentials_.session;
  expect_refused_answer(Greeting(mixed, Channel::kDemand, Security::kNone), [](wire::Hello&) {});
  EXPECT_EQ(other->counters().connections, 0u);
}

TEST_P(HostileHello, AHelloInPiecesIsAHello) {
  const UniqueFd fd = raw();
  Greeting honest = greeting();
  wire::HelloReply reply{};
  for (int turn = 0; turn < 2; ++turn) {
    const wire::Hello hello = honest.hello();
    const auto bytes = std::as_bytes(std::span(&hello, 1));
    for (size_t i = 0; i < bytes.size(); i += 7) {
      const auto piece = bytes.subspan(i, std::min<size_t>(7, bytes.size() - i));
      ASSERT_TRUE(send_exactly(fd.get(), piece, soon()).ok());
      ::usleep(2000);
    }
    ASSERT_TRUE(receive_raw(fd.get(), &reply));
    if (turn == 0) {
      ASSERT_TRUE(honest.take_challenge(reply).ok());
    }
  }
  EXPECT_TRUE(honest.take_reply(reply).ok());
}

TEST_P(HostileHello, SilenceIsClosedInTimeWhereverItBegins) {
  const UniqueFd silent = raw();
  const UniqueFd half = raw();
  const wire::Hello hello = greeting().hello();
  const auto bytes = std::as_bytes(std::span(&hello, 1));
  ASSERT_TRUE(send_exactly(half.get(), bytes.first(28), soon()).ok());
  Nonce nonce;
  const UniqueFd unanswered = challenged(greeting().hello(), &nonce);
  const UniqueFd half_answered = challenged(hello, &nonce);
  ASSERT_TRUE(send_exactly(half_answered.get(), bytes.first(28), soon()).ok());
  const UniqueFd drip = raw();
  // Longer than any wait below.
  std::thread dripper([&] {
    for (size_t i = 0; i + 1 < bytes.size(); ++i) {
      if (::send(drip.get(), bytes.data() + i, 1, MSG_NOSIGNAL) != 1) return;
      ::usleep(500'000);
    }
  });
  const auto limit = std::chrono::milliseconds(wire::kHelloTimeoutMs + 5000);
  for (const UniqueFd* fd : {&half, &silent, &unanswered, &half_answered})
    EXPECT_TRUE(closed_within(fd->get(), limit));
  EXPECT_TRUE(closed_within(drip.get(), limit)) << "dripping bytes must not buy time";
  dripper.join();
  EXPECT_GE(listener_->rejected_hellos(), 5u);
}

TEST_P(HostileHello, AFloodOfSilentConnectionsDoesNotKeepAnHonestOneOut) {
  std::vector<UniqueFd> flood;
  for (int i = 0; i < 200; ++i) flood.push_back(raw());
  const auto start = std::chrono::steady_clock::now();
  Greeting honest = greeting();
  Nonce nonce;
  const UniqueFd fd = challenged(honest.hello(), &nonce);
  // More of them while the honest one thinks.
  for (int i = 0; i < 200; ++i) flood.push_back(raw());
  ASSERT_TRUE(honest.take_challenge(challenge(nonce)).ok());
  ASSERT_TRUE(send_raw(fd.get(), honest.hello()));
  wire::HelloReply reply{};
  ASSERT_TRUE(receive_raw(fd.get(), &reply));
  EXPECT_TRUE(honest.take_reply(reply).ok());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(wire::kHelloTimeoutMs / 2));
  EXPECT_TRUE(
      eventually([&] { return listener_->rejected_hellos() >= flood.size() - wire::kHelloPendingMax; }));
}

TEST_P(HostileHello, AFloodOfUnansweredChallengesEndsInTime) {
  std::vector<UniqueFd> flood;
  Nonce nonce;
  for (uint32_t i = 0; i < 3 * wire::kHelloPendingMax; ++i)
    flood.push_back(challenged(greeting().hello(), &nonce));
  EXPECT_GE(listener_->rejected_hellos(), 2 * wire::kHelloPendingMax) << "the table is bounded";
  EXPECT_FALSE(closed_within(admitted().get(), std::chrono::milliseconds(1)));
  EXPECT_TRUE(eventually([&] { return listener_->rejected_hellos() >= flood.size(); }));
}

// All of the table but one slot is challenged, and strangers come faster than the honest one's hello.
TEST_P(HostileHello, AFloodOfBothKindsDoesNotKeepAnHonestOneOut) {
  std::vector<UniqueFd> flood;
  Nonce nonce;
  for (uint32_t i = 0; i < 2 * wire::kHelloPendingMax; ++i)
    flood.push_back(challenged(greeting().hello(), &nonce));
  const UniqueFd slow = raw();
  for (uint32_t i = 0; i < wire::kHelloPendingMax / 4; ++i) flood.push_back(raw());
  Greeting honest = greeting();
  wire::HelloReply reply{};
  ASSERT_TRUE(send_raw(slow.get(), honest.hello()));
  ASSERT_TRUE(receive_raw(slow.get(), &reply));
  ASSERT_TRUE(honest.take_challenge(reply).ok());
  ASSERT_TRUE(send_raw(slow.get(), honest.hello()));
  ASSERT_TRUE(receive_raw(slow.get(), &reply));
  EXPECT_TRUE(honest.take_reply(reply).ok());
}

wire::OldHello old_hello(const Credentials& credentials) {
  return make_old_hello(credentials, Channel::kDemand);
}

TEST_P(HostileHello, AnOldHelloIsRefusedUnlessItsSessionTakesIt) {
  const uint64_t rejected_before = listener_->rejected_hellos();
  UniqueFd fd = raw();
  ASSERT_TRUE(send_raw(fd.get(), old_hello(credentials_)));
  expect_refusal(fd.get(), wire::HelloStatus::kBadVersion, rejected_before);

  Credentials old = make_credentials(7, Security::kNone);
  old.old_hello = true;
  const auto session = listener_->expose_session(old, nullptr, nullptr).value();
  fd = raw();
  ASSERT_TRUE(send_raw(fd.get(), old_hello(credentials_)));
  expect_refusal(fd.get(), wire::HelloStatus::kBadVersion, rejected_before + 1);
  Credentials wrong = old;
  wrong.token[31] ^= 1;
  fd = raw();
  ASSERT_TRUE(send_raw(fd.get(), old_hello(wrong)));
  expect_refusal(fd.get(), wire::HelloStatus::kBadVersion, rejected_before + 2);

  fd = raw();
  ASSERT_TRUE(send_raw(fd.get(), old_hello(old)));
  std::array<std::byte, wire::kHelloReplyHeadBytes> head;
  ASSERT_TRUE(receive_exactly(fd.get(), head, soon()).ok());
  wire::HelloReply reply{};
  std::memcpy(&reply, head.data(), head.size());
  EXPECT_EQ(reply.version, wire::kOldHelloVersion);
  EXPECT_EQ(reply.status, static_cast<uint16_t>(wire::HelloStatus::kOk));
  EXPECT_FALSE(closed_within(fd.get(), std::chrono::milliseconds(50))) << "nothing follows an old reply";
  EXPECT_TRUE(connect(*GetParam(), listener_->address(), old).ok()) << "and the requester says it too";
}

INSTANTIATE_TEST_SUITE_P(Providers, HostileHello, testing::Values(&kTcpProvider, &kShmProvider),
                         [](const auto& suite) { return suite.param->name; });

}  // namespace
}  // namespace vmigrate::transport
