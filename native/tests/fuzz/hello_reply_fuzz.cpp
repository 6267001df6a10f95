// The requester's half of the hello, against a peer that sends anything. The peer may know the token: byte 0
// of the input says what of its answers is made right.

#include <sys/socket.h>

#include "tests/fuzz/fuzz.hpp"
#include "transport/hello.hpp"

namespace vmigrate {
namespace {

using namespace transport;

enum Mode : uint8_t { kOldHello = 1, kRightProof = 2, kBulk = 4 };

Credentials credentials_of(uint8_t mode) {
  Credentials credentials;
  credentials.session.fill(1);
  credentials.token.fill(2);
  credentials.old_hello = (mode & kOldHello) != 0;
  return credentials;
}

/// A whole connection, whose peer has sent everything before it is asked.
Result<Agreed> connect_to(std::span<const std::byte> answers, const Credentials& credentials,
                          Channel channel) {
  int ends[2];
  VMG_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd own(ends[0]), peer(ends[1]);
  VMG_CHECK(::send(peer.get(), answers.data(), answers.size(), MSG_NOSIGNAL) ==
            static_cast<ssize_t>(answers.size()));
  ::shutdown(peer.get(), SHUT_WR);
  return say_hello(own.get(), credentials, channel, Security::kIntegrity,
                   std::chrono::steady_clock::now() + std::chrono::seconds(5));
}

/// The exchange itself: the peer's answers may depend on what is said to it.
void greet(fuzz::Input input, uint8_t mode) {
  const Credentials credentials = credentials_of(mode);
  Greeting greeting(credentials, Channel::kDemand, Security::kIntegrity);
  const wire::Hello first = greeting.hello();
  const auto challenge = input.take<wire::HelloReply>();
  auto reply = input.take<wire::HelloReply>();

  const bool is_challenge = challenge.magic == wire::kHelloMagic &&
                            challenge.version == wire::kProtocolVersion &&
                            challenge.status == static_cast<uint16_t>(wire::HelloStatus::kChallenge);
  VMG_CHECK(greeting.take_challenge(challenge).ok() == is_challenge);
  VMG_CHECK(is_same_hello(first, greeting.hello()));
  if (!is_challenge) {
    VMG_CHECK(std::memcmp(&first, &greeting.hello(), sizeof first) == 0);
    return;
  }
  Transcript transcript{first, {}};
  std::copy(std::begin(challenge.value), std::end(challenge.value), transcript.source_nonce.begin());
  Agreed agreed_there;
  wire::HelloReply right{};
  VMG_CHECK(accept_hello(credentials.token, transcript, &agreed_there, &right));
  if ((mode & kRightProof) != 0) std::copy(std::begin(right.value), std::end(right.value), reply.value);
  const auto agreed = greeting.take_reply(reply);
  VMG_CHECK(agreed.ok() == (std::memcmp(&reply, &right, sizeof reply) == 0));
  if (!agreed) return;
  VMG_CHECK(agreed.value().channel == Channel::kDemand && agreed.value().security == Security::kIntegrity);
  VMG_CHECK(agreed.value().target_key == agreed_there.target_key);
  VMG_CHECK(agreed.value().source_key == agreed_there.source_key);
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const wire::HelloReply challenged = challenge({1, 2, 3}), yes = hello_reply(wire::HelloStatus::kOk);
  for (const uint8_t mode : {0, 2, 4}) {
    all.push_back(Seed().add(mode).add(challenged).add(yes));
    all.push_back(Seed().add(mode).add(yes));
  }
  wire::HelloReply old = yes;
  old.version = wire::kOldHelloVersion;
  all.push_back(Seed().add(uint8_t{kOldHello}).add(old));
  for (uint16_t status = 0; status < 8; ++status) {
    old.status = status;
    wire::HelloReply other = yes;
    other.status = status;
    all.push_back(Seed().add(uint8_t{kOldHello}).add(old));
    all.push_back(Seed().add(uint8_t{0}).add(challenged).add(other));
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  fuzz::Input input(bytes, length_bytes);
  const auto mode = input.take<uint8_t>();
  if ((mode & kOldHello) == 0) greet(input, mode);
  const Credentials credentials = credentials_of(mode);
  const auto channel = (mode & kBulk) != 0 ? Channel::kBulk : Channel::kDemand;
  const auto answers = input.bytes(2 * sizeof(wire::HelloReply));
  const auto agreed = connect_to(answers, credentials, channel);
  // A proof that was made beforehand is right for no nonce of ours.
  VMG_CHECK(!agreed || ((mode & kOldHello) != 0 && agreed.value().security == Security::kNone &&
                        agreed.value().channel == channel));
  return 0;
}
