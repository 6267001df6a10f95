#include "transport/shm/provider.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <cstdio>

#include "transport/shm/endpoint.hpp"
#include "transport/shm/serve.hpp"
#include "transport/socket.hpp"
#include "transport/stream/listener.hpp"

namespace vmigrate::transport {
namespace {

/// Opens a separate descriptor for the peer, with no more rights than the key grants. It gives access to the
/// whole file, and a peer that may open the file by itself keeps whatever rights it has. So shm protects a
/// region from mistakes of a trusted neighbour, and the token keeps strangers out.
Status prepare_key(ExposedKey& key) {
  const LocalMemory& memory = key.memory.memory();
  if (memory.fd < 0) return Error{ErrorCode::kUnsupported, 0, "shm exposes files only"};
  char path[sizeof "/proc/self/fd/" + 12];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", memory.fd);
  const int flags = (key.access == Access::kReadWrite ? O_RDWR : O_RDONLY) | O_CLOEXEC;
  key.passed_fd.reset(::open(path, flags));
  if (!key.passed_fd.valid()) return system_error("open region file for the peer");
  return ok();
}

constexpr StreamService kShmService{.serve = &serve_shm, .prepare = &prepare_key, .tcp = false};

// A daemon that was killed leaves its socket file behind. No process listens on it, so the name is free.
bool remove_stale(const std::string& path, const SocketAddress& address) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0 || !S_ISSOCK(info.st_mode)) return false;
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!probe.valid() || ::connect(probe.get(), address.get(), address.length) == 0) return false;
  return errno == ECONNREFUSED && ::unlink(path.c_str()) == 0;
}

Result<std::unique_ptr<Listener>> listen_shm(const Address& address, const Options& options) {
  if (!options.empty()) return kNoOptions;
  auto socket_address = unix_socket_address(address.host);
  if (!socket_address) return socket_address.error();
  const SocketAddress& local = socket_address.value();
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return system_error("socket");
  int error = ::bind(fd.get(), local.get(), local.length) == 0 ? 0 : errno;
  if (error == EADDRINUSE && remove_stale(address.host, local))
    error = ::bind(fd.get(), local.get(), local.length) == 0 ? 0 : errno;
  if (error != 0) return system_error("bind data socket", error == EADDRINUSE ? EEXIST : error);
  // Before listen(), so that no other user gets as far as the hello.
  if (::chmod(address.host.c_str(), 0600) != 0 || ::listen(fd.get(), SOMAXCONN) != 0) {
    const int failed = errno;
    (void)::unlink(address.host.c_str());
    return system_error("listen on data socket", failed);
  }
  return StreamListener::start(std::move(fd), Address{address.host, 0}, kShmService, address.host);
}

Result<std::unique_ptr<Endpoint>> connect_shm(const Address& address, const Credentials& credentials,
                                              Channel channel, std::chrono::milliseconds timeout,
                                              const Options& options) {
  if (!options.empty()) return kNoOptions;
  return connect_stream<ShmEndpoint>(unix_socket_address(address.host), credentials, channel, timeout,
                                     Security::kNone);
}

}  // namespace

constinit const Provider kShmProvider{
    .name = "shm",
    .connect = &connect_shm,
    .listen = &listen_shm,
    .host_is_path = true,
    .shares_files = true,
};

}  // namespace vmigrate::transport
