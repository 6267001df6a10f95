#pragma once

#include "base/result.hpp"
#include "transport/socket.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The requester's half: sends a hello on a fresh connection and waits for the answer. kRefused: the peer
/// refused; kProtocol: the peer speaks another protocol; kTimeout; kDisconnected.
Status say_hello(int fd, const Credentials& credentials, Channel channel, Deadline deadline);

wire::Hello make_hello(const Credentials& credentials, Channel channel);
/// Converts the answer to a hello into a status for its sender.
Status check_reply(const wire::HelloReply& reply);

/// Checks a hello before its credentials are looked up. The peer chose the fields of `hello`.
wire::HelloStatus check_hello(const wire::Hello& hello);

wire::HelloReply hello_reply(wire::HelloStatus status);

}  // namespace vmigrate::transport
