#pragma once

#include "base/result.hpp"
#include "transport/proof.hpp"
#include "transport/socket.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// What both ends of a connection agree on.
struct Agreed {
  Channel channel{};
  Security security = Security::kNone;
  /// kIntegrity: for what the target sends, and for what the source sends. kEncrypt: TLS uses the first.
  FrameKey target_key{};
  FrameKey source_key{};
};

/// The requester's half. Whoever carries the messages sends hello(), then, after a challenge was taken,
/// hello() again.
class Greeting {
 public:
  Greeting(const Credentials& credentials, Channel channel, Security security);

  const wire::Hello& hello() const { return hello_; }
  /// The answer to the first hello. kRefused, kProtocol as check_reply.
  Status take_challenge(const wire::HelloReply& reply);
  /// The answer to the second hello. kRefused also if the peer does not have the token.
  Result<Agreed> take_reply(const wire::HelloReply& reply) const;

 private:
  const SessionToken token_;
  Transcript transcript_;
  wire::Hello hello_;
};

/// Says hello on a fresh connection. With Credentials::old_hello in the old way, without security. kRefused:
/// the peer refused, speaks another protocol, or is not who it says; kProtocol; kTimeout; kDisconnected.
Result<Agreed> say_hello(int fd, const Credentials& credentials, Channel channel, Security security,
                         Deadline deadline);

/// The hello of OLD_HELLO_VERSION.
wire::OldHello make_old_hello(const Credentials& credentials, Channel channel);

/// Checks a first hello without any look at sessions. The peer chose the fields of `hello`.
wire::HelloStatus check_hello(const wire::Hello& hello);
/// Whether `second` says what `first` said, apart from the proof.
bool is_same_hello(const wire::Hello& first, const wire::Hello& second);
/// The source's reply to a right second hello, and what was agreed. False: libcrypto failed.
bool accept_hello(const SessionToken& token, const Transcript& transcript, Agreed* agreed,
                  wire::HelloReply* reply);

/// Converts the answer to a hello of `version` into a status for its sender: `expected` is no error.
Status check_reply(const wire::HelloReply& reply, wire::HelloStatus expected,
                   uint16_t version = wire::kProtocolVersion);
wire::HelloReply hello_reply(wire::HelloStatus status);
wire::HelloReply challenge(const Nonce& source_nonce);

}  // namespace vmigrate::transport
