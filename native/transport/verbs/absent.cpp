// Replaces the provider verbs in a build without the verbs headers.

#include "transport/verbs/provider.hpp"

namespace vmigrate::transport {
namespace {

constexpr Error kNotBuilt{
    ErrorCode::kUnsupported, 0,
    "built without RDMA: install the packages libibverbs-dev and librdmacm-dev, and build again"};

}  // namespace

constinit const Provider kVerbsProvider{
    .name = "verbs",
    .connect = [](const Address&, const Credentials&, Channel, std::chrono::milliseconds,
                  const Options&) -> Result<std::unique_ptr<Endpoint>> { return kNotBuilt; },
    .listen = [](const Address&, const Options&) -> Result<std::unique_ptr<Listener>> { return kNotBuilt; },
    .devices = []() -> Result<std::vector<Device>> { return kNotBuilt; },
    .pins_memory = true,
};

}  // namespace vmigrate::transport
