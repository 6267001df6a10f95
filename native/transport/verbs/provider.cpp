#include "transport/verbs/provider.hpp"

#include "transport/verbs/endpoint.hpp"
#include "transport/verbs/host/devices.hpp"
#include "transport/verbs/listener.hpp"

namespace vmigrate::transport {
namespace {

/// `address.host` is an IP address of an RDMA device (for InfiniBand: of its IPoIB interface).
Result<std::unique_ptr<Endpoint>> connect_verbs(const Address& address, const Credentials& credentials,
                                                Channel channel, std::chrono::milliseconds timeout,
                                                const Options& options) {
  const auto parsed = verbs_options(options);
  if (!parsed) return parsed.error();
  return VerbsEndpoint::connect(address, credentials, channel, std::chrono::steady_clock::now() + timeout,
                                parsed.value());
}

/// `address.host` must name one device, so it cannot be the wildcard.
Result<std::unique_ptr<Listener>> listen_verbs(const Address& address, const Options& options) {
  const auto parsed = verbs_options(options);
  if (!parsed) return parsed.error();
  return VerbsListener::start(address, parsed.value());
}

}  // namespace

constinit const Provider kVerbsProvider{
    .name = "verbs",
    .connect = &connect_verbs,
    .listen = &listen_verbs,
    .devices = &verbs_devices,
    .pins_memory = true,
};

}  // namespace vmigrate::transport
