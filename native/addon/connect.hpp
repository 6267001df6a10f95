#pragma once

#include <napi.h>

#include <chrono>
#include <vector>

#include "addon/convert.hpp"
#include "fetch/endpoints.hpp"

namespace vmigrate::addon {

/// What a session's connect(source, timeoutMs) needs outside the JS thread.
struct ConnectRequest {
  const transport::Provider* provider;
  transport::Address address;
  transport::Options options;
  transport::Credentials credentials;
  std::vector<pager::SourceRegionKeys> keys;
  std::chrono::milliseconds timeout;
};

/// JS thread. kProtocol if the holder has another number of regions.
Result<ConnectRequest> connect_request(const Napi::CallbackInfo& info, size_t region_count);
/// Opens both channels. Blocks for at most the request's timeout; what is left of it is for the probe.
Result<pager::SourceEndpoints> open_endpoints(ConnectRequest request);

}  // namespace vmigrate::addon
