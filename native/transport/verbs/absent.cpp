// Stands in for the provider verbs where its headers were missing when this was built.

#include "transport/transport.hpp"

namespace vmigrate::transport {
namespace {

constexpr Error kNotBuilt{
    ErrorCode::kUnsupported, 0,
    "built without RDMA: install the packages libibverbs-dev and librdmacm-dev, and build again"};

}  // namespace

Result<std::unique_ptr<Endpoint>> connect_verbs(const Address&, const Credentials&, Channel,
                                                std::chrono::milliseconds, const VerbsOptions&) {
  return kNotBuilt;
}

Result<std::unique_ptr<Listener>> listen_verbs(const Address&, const VerbsOptions&) {
  return kNotBuilt;
}

Result<std::vector<std::string>> verbs_addresses() {
  return kNotBuilt;
}

Result<std::vector<VerbsDevice>> verbs_devices() {
  return kNotBuilt;
}

}  // namespace vmigrate::transport
