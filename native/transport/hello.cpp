#include "transport/hello.hpp"

#include <algorithm>

namespace vmigrate::transport {

wire::Hello make_hello(const Credentials& credentials, Channel channel) {
  wire::Hello hello{};
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kProtocolVersion;
  hello.channel = static_cast<uint16_t>(channel);
  std::copy(credentials.session.begin(), credentials.session.end(), hello.session);
  std::copy(credentials.token.begin(), credentials.token.end(), hello.token);
  return hello;
}

Status say_hello(int fd, const Credentials& credentials, Channel channel, Deadline deadline) {
  const wire::Hello hello = make_hello(credentials, channel);
  if (Status sent = send_exactly(fd, std::as_bytes(std::span(&hello, 1)), deadline); !sent) return sent;

  wire::HelloReply reply{};
  if (Status got = receive_exactly(fd, std::as_writable_bytes(std::span(&reply, 1)), deadline); !got)
    return got;
  return check_reply(reply);
}

Status check_reply(const wire::HelloReply& reply) {
  if (reply.magic != wire::kHelloMagic)
    return Error{ErrorCode::kProtocol, 0, "hello reply has a wrong magic"};
  if (reply.version != wire::kProtocolVersion)
    return Error{ErrorCode::kRefused, 0, "peer speaks another protocol version"};
  switch (static_cast<wire::HelloStatus>(reply.status)) {
    case wire::HelloStatus::kOk:
      return ok();
    case wire::HelloStatus::kBadMagic:
    case wire::HelloStatus::kBadVersion:
    case wire::HelloStatus::kRefused:
      return Error{ErrorCode::kRefused, 0, "peer refused the session or its token"};
    case wire::HelloStatus::kBusy:
      return Error{ErrorCode::kRefused, 0, "peer has no room for another connection"};
  }
  return Error{ErrorCode::kProtocol, 0, "hello reply has an unknown status"};
}

wire::HelloStatus check_hello(const wire::Hello& hello) {
  if (hello.magic != wire::kHelloMagic) return wire::HelloStatus::kBadMagic;
  if (hello.version != wire::kProtocolVersion) return wire::HelloStatus::kBadVersion;
  return wire::HelloStatus::kOk;
}

wire::HelloReply hello_reply(wire::HelloStatus status) {
  wire::HelloReply reply{};
  reply.magic = wire::kHelloMagic;
  reply.version = wire::kProtocolVersion;
  reply.status = static_cast<uint16_t>(status);
  return reply;
}

}  // namespace vmigrate::transport
