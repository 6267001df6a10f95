#include "transport/shm/endpoint.hpp"

#include "transport/hello.hpp"
#include "transport/limits.hpp"
#include "transport/socket.hpp"

namespace vmigrate::transport {

ShmEndpoint::ShmEndpoint(UniqueFd socket)
    : socket_(std::move(socket)), bounce_(std::make_unique_for_overwrite<std::byte[]>(kStoreBytesMax)) {}

ShmEndpoint::~ShmEndpoint() = default;

Status ShmEndpoint::open() {
  if (Status opened = ready_.open(); !opened) return opened;
  return ready_.watch(socket_.get());
}

Result<std::unique_ptr<Endpoint>> connect_shm(const Address& address, const Credentials& credentials,
                                              Channel channel, std::chrono::milliseconds timeout) {
  const Deadline deadline = std::chrono::steady_clock::now() + timeout;
  auto socket_address = unix_socket_address(address.host);
  if (!socket_address) return socket_address.error();
  auto socket = connect_socket(socket_address.value(), deadline);
  if (!socket) return socket.error();
  if (Status said = say_hello(socket.value().get(), credentials, channel, deadline); !said)
    return said.error();
  auto endpoint = std::make_unique<ShmEndpoint>(std::move(socket).value());
  if (Status opened = endpoint->open(); !opened) return opened.error();
  return std::unique_ptr<Endpoint>(std::move(endpoint));
}

}  // namespace vmigrate::transport
