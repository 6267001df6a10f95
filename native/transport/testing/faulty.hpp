#pragma once

#include <memory>
#include <optional>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// What goes wrong, by name. All off: the endpoint behaves as the one it wraps. One seed, one behaviour, as
/// far as the wrapped endpoint's timing allows.
struct FaultyOptions {
  uint64_t seed = 1;
  /// Each completion is held back for 0 to so many polls.
  uint32_t completion_delay_polls_max = 0;
  /// Completions that are due come in any order.
  bool reorder_completions = false;
  /// So many of 1000 posts and sends take nothing and say would-block.
  uint32_t would_block_permille = 0;
  /// A post takes a random part of its batch, at least one, and says would-block for the rest.
  bool short_batches = false;
  /// This operation (the first is 0) completes with `failed_result`, whatever came of it.
  std::optional<uint64_t> failed_operation;
  OpResult failed_result = OpResult::kIoError;
  /// Disconnects when so many operations have been posted.
  std::optional<uint64_t> disconnect_after_operations;
};

/// Wraps an endpoint in faults that its owner must live with. The same rules hold as for any endpoint.
Result<std::unique_ptr<Endpoint>> make_faulty(std::unique_ptr<Endpoint> endpoint,
                                              const FaultyOptions& options);

}  // namespace vmigrate::transport
