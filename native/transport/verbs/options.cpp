#include "transport/verbs/options.hpp"

namespace vmigrate::transport {
namespace {

/// The fields have five bits and three bits. An exponent of 0 would mean to wait for ever.
constexpr uint64_t kAckTimeoutExponentMax = 31;
constexpr uint64_t kRetryCountMax = 7;

}  // namespace

Result<VerbsOptions> verbs_options(const Options& options) {
  VerbsOptions parsed;
  for (const auto& [name, value] : options) {
    const uint64_t* number = std::get_if<uint64_t>(&value);
    const std::string* text = std::get_if<std::string>(&value);
    if (name == "localAddress") {
      if (text == nullptr) return Error{ErrorCode::kInvalidArgument, 0, "localAddress is not a string"};
      parsed.local_host = *text;
    } else if (name == "ackTimeoutExponent") {
      if (number == nullptr || *number == 0 || *number > kAckTimeoutExponentMax)
        return Error{ErrorCode::kInvalidArgument, 0, "ackTimeoutExponent must be 1 to 31"};
      parsed.ack_timeout_exponent = static_cast<uint8_t>(*number);
    } else if (name == "retryCount") {
      if (number == nullptr || *number > kRetryCountMax)
        return Error{ErrorCode::kInvalidArgument, 0, "retryCount must be 0 to 7"};
      parsed.retry_count = static_cast<uint8_t>(*number);
    } else {
      return Error{ErrorCode::kInvalidArgument, 0, "unknown option of an RDMA connection"};
    }
  }
  return parsed;
}

}  // namespace vmigrate::transport
