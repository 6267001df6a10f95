#include "transport/tcp/provider.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>

#include "transport/socket.hpp"
#include "transport/stream/listener.hpp"
#include "transport/tcp/endpoint.hpp"
#include "transport/tcp/serve.hpp"

namespace vmigrate::transport {
namespace {

constexpr Security kTcpSecurityMax = Security::kEncrypt;

constexpr StreamService kTcpService{.serve = &serve_tcp,
                                    .prepare = [](ExposedKey&) { return ok(); },
                                    .tcp = true,
                                    .security_max = kTcpSecurityMax};

uint16_t port_of(const SocketAddress& address) {
  if (address.storage.ss_family == AF_INET)
    return ntohs(reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_port);
  return ntohs(reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_port);
}

Result<std::unique_ptr<Listener>> listen_tcp(const Address& address, const Options& options) {
  if (!options.empty()) return kNoOptions;
  auto socket_address = tcp_socket_address(address);
  if (!socket_address) return socket_address.error();
  UniqueFd fd(
      ::socket(socket_address.value().storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  const int one = 1;
  if (::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0)
    return system_error("setsockopt SO_REUSEADDR");
  if (::bind(fd.get(), socket_address.value().get(), socket_address.value().length) != 0)
    return system_error("bind data port");
  if (::listen(fd.get(), SOMAXCONN) != 0) return system_error("listen on data port");
  SocketAddress bound;
  bound.length = sizeof bound.storage;
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) != 0)
    return system_error("getsockname data port");
  return StreamListener::start(std::move(fd), Address{address.host, port_of(bound)}, kTcpService, {});
}

Result<std::unique_ptr<Endpoint>> connect_tcp(const Address& address, const Credentials& credentials,
                                              Channel channel, std::chrono::milliseconds timeout,
                                              const Options& options) {
  if (!options.empty()) return kNoOptions;
  return connect_stream<TcpEndpoint>(tcp_socket_address(address), credentials, channel, timeout,
                                     kTcpSecurityMax);
}

}  // namespace

constinit const Provider kTcpProvider{
    .name = "tcp",
    .connect = &connect_tcp,
    .listen = &listen_tcp,
    .protects_frames = true,
    .serves_by_thread = true,
};

}  // namespace vmigrate::transport
