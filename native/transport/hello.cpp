#include "transport/hello.hpp"

#include <algorithm>
#include <cstring>

#include "transport/credentials.hpp"

namespace vmigrate::transport {
namespace {

constexpr Error kNoCrypto{ErrorCode::kUnsupported, 0, "libcrypto has no HMAC-SHA256"};
/// What the agreed keys are for, by Security: a key serves one purpose.
constexpr const char* kPurposes[] = {nullptr, nullptr, "frames", "TLS"};

template <typename T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

bool make_agreed(const SessionToken& token, const Transcript& transcript, Agreed* agreed) {
  agreed->channel = static_cast<Channel>(transcript.hello.channel);
  agreed->security = static_cast<Security>(transcript.hello.security);
  const char* purpose = kPurposes[transcript.hello.security];
  return purpose == nullptr || (derive_key(token, End::kTarget, purpose, transcript, &agreed->target_key) &&
                                derive_key(token, End::kSource, purpose, transcript, &agreed->source_key));
}

// The head first: an older peer sends no more than that.
Status receive_reply(int fd, wire::HelloReply* reply, Deadline deadline) {
  const auto bytes = std::as_writable_bytes(std::span(reply, 1));
  if (Status got = receive_exactly(fd, bytes.first(wire::kHelloReplyHeadBytes), deadline); !got) return got;
  if (reply->magic != wire::kHelloMagic || reply->version != wire::kProtocolVersion) return ok();
  return receive_exactly(fd, bytes.subspan(wire::kHelloReplyHeadBytes), deadline);
}

Result<Agreed> say_old_hello(int fd, const Credentials& credentials, Channel channel, Deadline deadline) {
  wire::OldHello hello = make_old_hello(credentials, channel);
  const Status sent = send_exactly(fd, bytes_of(hello), deadline);
  explicit_bzero(&hello, sizeof hello);
  if (!sent) return sent.error();
  wire::HelloReply reply{};
  const auto head = std::as_writable_bytes(std::span(&reply, 1)).first(wire::kHelloReplyHeadBytes);
  if (Status got = receive_exactly(fd, head, deadline); !got) return got.error();
  if (Status checked = check_reply(reply, wire::HelloStatus::kOk, wire::kOldHelloVersion); !checked)
    return checked.error();
  return Agreed{.channel = channel};
}

}  // namespace

Greeting::Greeting(const Credentials& credentials, Channel channel, Security security)
    : token_(credentials.token) {
  wire::Hello& hello = transcript_.hello;
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kProtocolVersion;
  hello.channel = static_cast<uint8_t>(channel);
  hello.security = static_cast<uint8_t>(security);
  std::copy(credentials.session.begin(), credentials.session.end(), hello.session);
  const Nonce nonce = random_nonce();
  std::copy(nonce.begin(), nonce.end(), hello.nonce);
  hello_ = hello;
}

Status Greeting::take_challenge(const wire::HelloReply& reply) {
  if (Status checked = check_reply(reply, wire::HelloStatus::kChallenge); !checked) return checked;
  std::copy(std::begin(reply.value), std::end(reply.value), transcript_.source_nonce.begin());
  Proof proof;
  if (!make_proof(token_, End::kTarget, transcript_, &proof)) return kNoCrypto;
  std::copy(proof.begin(), proof.end(), hello_.proof);
  return ok();
}

Result<Agreed> Greeting::take_reply(const wire::HelloReply& reply) const {
  if (Status checked = check_reply(reply, wire::HelloStatus::kOk); !checked) return checked.error();
  Proof expected;
  Agreed agreed;
  if (!make_proof(token_, End::kSource, transcript_, &expected) || !make_agreed(token_, transcript_, &agreed))
    return kNoCrypto;
  if (!equal_constant_time(expected, reply.value))
    return Error{ErrorCode::kRefused, 0, "peer does not know the session's token"};
  return agreed;
}

Result<Agreed> say_hello(int fd, const Credentials& credentials, Channel channel, Security security,
                         Deadline deadline) {
  if (credentials.old_hello) return say_old_hello(fd, credentials, channel, deadline);
  Greeting greeting(credentials, channel, security);
  wire::HelloReply reply{};
  if (Status sent = send_exactly(fd, bytes_of(greeting.hello()), deadline); !sent) return sent.error();
  if (Status got = receive_reply(fd, &reply, deadline); !got) return got.error();
  if (Status taken = greeting.take_challenge(reply); !taken) return taken.error();
  if (Status sent = send_exactly(fd, bytes_of(greeting.hello()), deadline); !sent) return sent.error();
  if (Status got = receive_reply(fd, &reply, deadline); !got) return got.error();
  return greeting.take_reply(reply);
}

wire::OldHello make_old_hello(const Credentials& credentials, Channel channel) {
  wire::OldHello hello{};
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kOldHelloVersion;
  hello.channel = static_cast<uint16_t>(channel);
  std::copy(credentials.session.begin(), credentials.session.end(), hello.session);
  std::copy(credentials.token.begin(), credentials.token.end(), hello.token);
  return hello;
}

wire::HelloStatus check_hello(const wire::Hello& hello) {
  if (hello.magic != wire::kHelloMagic) return wire::HelloStatus::kBadMagic;
  if (hello.version != wire::kProtocolVersion) return wire::HelloStatus::kBadVersion;
  const auto channel = static_cast<Channel>(hello.channel);
  const bool is_channel = channel == Channel::kDemand || channel == Channel::kBulk;
  const bool is_security = hello.security >= static_cast<uint8_t>(Security::kNone) &&
                           hello.security <= static_cast<uint8_t>(Security::kEncrypt);
  const bool is_first =
      std::all_of(std::begin(hello.proof), std::end(hello.proof), [](uint8_t byte) { return byte == 0; });
  return is_channel && is_security && is_first ? wire::HelloStatus::kOk : wire::HelloStatus::kRefused;
}

bool is_same_hello(const wire::Hello& first, const wire::Hello& second) {
  return std::memcmp(&first, &second, offsetof(wire::Hello, proof)) == 0;
}

bool accept_hello(const SessionToken& token, const Transcript& transcript, Agreed* agreed,
                  wire::HelloReply* reply) {
  Proof proof;
  if (!make_proof(token, End::kSource, transcript, &proof) || !make_agreed(token, transcript, agreed))
    return false;
  *reply = hello_reply(wire::HelloStatus::kOk);
  std::copy(proof.begin(), proof.end(), reply->value);
  return true;
}

Status check_reply(const wire::HelloReply& reply, wire::HelloStatus expected, uint16_t version) {
  if (reply.magic != wire::kHelloMagic)
    return Error{ErrorCode::kProtocol, 0, "hello reply has a wrong magic"};
  if (reply.version != version) return Error{ErrorCode::kRefused, 0, "peer speaks another protocol version"};
  const auto status = static_cast<wire::HelloStatus>(reply.status);
  if (status == expected) return ok();
  switch (status) {
    case wire::HelloStatus::kBadMagic:
    case wire::HelloStatus::kBadVersion:
    case wire::HelloStatus::kRefused:
      return Error{ErrorCode::kRefused, 0, "peer refused the session or its token"};
    case wire::HelloStatus::kBusy:
      return Error{ErrorCode::kRefused, 0, "peer has no room for another connection"};
    case wire::HelloStatus::kOk:
    case wire::HelloStatus::kChallenge:
      return Error{ErrorCode::kProtocol, 0, "hello reply is out of turn"};
  }
  return Error{ErrorCode::kProtocol, 0, "hello reply has an unknown status"};
}

wire::HelloReply hello_reply(wire::HelloStatus status) {
  wire::HelloReply reply{};
  reply.magic = wire::kHelloMagic;
  reply.version = wire::kProtocolVersion;
  reply.status = static_cast<uint16_t>(status);
  return reply;
}

wire::HelloReply challenge(const Nonce& source_nonce) {
  wire::HelloReply reply = hello_reply(wire::HelloStatus::kChallenge);
  std::copy(source_nonce.begin(), source_nonce.end(), reply.value);
  return reply;
}

}  // namespace vmigrate::transport
