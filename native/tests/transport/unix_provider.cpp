#include "tests/transport/unix_provider.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include "transport/stream/listener.hpp"
#include "transport/tcp/endpoint.hpp"
#include "transport/tcp/serve.hpp"

namespace vmigrate::transport {
namespace {

constexpr StreamService kUnixService{.serve = &serve_tcp,
                                     .prepare = [](ExposedKey&) { return ok(); },
                                     .tcp = false,
                                     .security_max = Security::kEncrypt};

Result<std::unique_ptr<Listener>> listen_unix(const Address& address, const Options&) {
  auto local = unix_socket_address(address.host);
  if (!local) return local.error();
  (void)::unlink(address.host.c_str());
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid() || ::bind(fd.get(), local.value().get(), local.value().length) != 0 ||
      ::listen(fd.get(), SOMAXCONN) != 0)
    return system_error("listen on unix socket");
  return StreamListener::start(std::move(fd), address, kUnixService, address.host);
}

Result<std::unique_ptr<Endpoint>> connect_unix(const Address& address, const Credentials& credentials,
                                               Channel channel, std::chrono::milliseconds timeout,
                                               const Options&) {
  return connect_stream<TcpEndpoint>(unix_socket_address(address.host), credentials, channel, timeout,
                                     Security::kEncrypt);
}

}  // namespace

constinit const Provider kUnixProvider{
    .name = "unix",
    .connect = &connect_unix,
    .listen = &listen_unix,
    .protects_frames = true,
    .host_is_path = true,
    .serves_by_thread = true,
};

}  // namespace vmigrate::transport
