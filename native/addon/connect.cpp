#include "addon/connect.hpp"

#include <algorithm>

namespace vmigrate::addon {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

Result<ConnectRequest> connect_request(const Napi::CallbackInfo& info, size_t region_count) {
  const Napi::Object source = info[0].As<Napi::Object>();
  const auto parsed = credentials(source);
  if (!parsed) return parsed.error();
  const auto keys = region_keys(source);
  if (!keys) return keys.error();
  if (keys.value().size() != region_count)
    return Error{ErrorCode::kProtocol, 0, "the source has another number of regions"};
  const auto found = provider(source);
  if (!found) return found.error();
  return ConnectRequest{
      found.value(),  address(source), provider_options(source),
      parsed.value(), keys.value(),    milliseconds(info[1].As<Napi::Number>().Int64Value())};
}

Result<pager::SourceEndpoints> open_endpoints(ConnectRequest request) {
  const auto deadline = steady_clock::now() + request.timeout;
  const auto left = [&] {
    return std::max(std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now()),
                    milliseconds(1));
  };
  const auto connect = [&](transport::Channel channel) {
    return request.provider->connect(request.address, request.credentials, channel, left(), request.options);
  };
  auto demand = connect(transport::Channel::kDemand);
  if (!demand) return demand.error();
  auto bulk = connect(transport::Channel::kBulk);
  if (!bulk) return bulk.error();
  return pager::SourceEndpoints{std::move(demand).value(), std::move(bulk).value(), std::move(request.keys),
                                left()};
}

}  // namespace vmigrate::addon
