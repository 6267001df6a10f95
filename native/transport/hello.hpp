#pragma once

#include "base/result.hpp"
#include "transport/socket.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The requester's half: says hello on a fresh connection and waits for the answer. kRefused: the peer said
/// no; kProtocol: it speaks something else; kTimeout; kDisconnected.
Status say_hello(int fd, const Credentials& credentials, Channel channel, Deadline deadline);

wire::Hello make_hello(const Credentials& credentials, Channel channel);
/// What an answer means to the one who said hello.
Status check_reply(const wire::HelloReply& reply);

/// What a hello is worth before anyone looks at who sent it. The fields of `hello` are the peer's.
wire::HelloStatus check_hello(const wire::Hello& hello);

wire::HelloReply hello_reply(wire::HelloStatus status);

}  // namespace vmigrate::transport
