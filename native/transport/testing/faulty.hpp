#pragma once

#include <memory>
#include <optional>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The faults to inject. With all off, the endpoint behaves like the wrapped one. One seed gives one
/// behaviour, as far as the wrapped endpoint's timing allows.
struct FaultyOptions {
  uint64_t seed = 1;
  /// Each completion is held back for 0 to this many polls.
  uint32_t completion_delay_polls_max = 0;
  /// Completions that are due are returned in random order.
  bool reorder_completions = false;
  /// This many of 1000 posts and sends take nothing and return would-block.
  uint32_t would_block_permille = 0;
  /// A post takes a random part of its batch, at least one operation, and returns would-block for the rest.
  bool short_batches = false;
  /// This operation (the first is 0) completes with `failed_result`, whatever its real result.
  std::optional<uint64_t> failed_operation;
  OpResult failed_result = OpResult::kIoError;
  /// Disconnects when this many operations have been posted.
  std::optional<uint64_t> disconnect_after_operations;
};

/// Wraps an endpoint and injects faults that the contract allows. The same rules hold as for any endpoint.
Result<std::unique_ptr<Endpoint>> make_faulty(std::unique_ptr<Endpoint> endpoint,
                                              const FaultyOptions& options);

}  // namespace vmigrate::transport
