#include "fetch/probe.hpp"

#include <poll.h>

#include <algorithm>
#include <array>

namespace vmigrate::pager {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr uint64_t kProbeTag = ~uint64_t{0};
constexpr Error kLost{ErrorCode::kDisconnected, 0, "a READ of a connection"};
/// A device may complete without making the descriptor readable in time, so it is asked at least this often.
constexpr milliseconds kPollMax{20};

/// Waits until the endpoint may have news.
void wait(const transport::Endpoint& endpoint, milliseconds timeout) {
  pollfd waiting{.fd = endpoint.event_fd(), .events = POLLIN, .revents = 0};
  (void)::poll(&waiting, 1, static_cast<int>(std::clamp(timeout, milliseconds(1), kPollMax).count()));
}

}  // namespace

Result<transport::OpResult> read_and_wait(transport::Endpoint& endpoint,
                                          const transport::Operation& operation, milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  bool posted = false;
  for (;;) {
    if (!posted) {
      const transport::PostResult result = endpoint.read({&operation, 1});
      if (result.status == transport::PostStatus::kDisconnected) return kLost;
      posted = result.posted == 1;
    }
    std::array<transport::Completion, 1> done;
    if (endpoint.poll(done) == 1) {
      if (done[0].result == transport::OpResult::kDisconnected) return kLost;
      if (done[0].tag != operation.tag)
        return Error{ErrorCode::kProtocol, 0, "completion of an operation that is not outstanding"};
      return done[0].result;
    }
    if (endpoint.disconnected()) return kLost;
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
    if (left.count() <= 0) return Error{ErrorCode::kPathStalled, 0, "full-size packets do not arrive"};
    wait(endpoint, left);
  }
}

Status probe_path(transport::Endpoint& endpoint, transport::LocalId buffer, const transport::RemoteKey& map,
                  milliseconds timeout) {
  const transport::Operation operation{
      .tag = kProbeTag,
      .local = buffer,
      .local_offset_bytes = 0,
      .remote = map,
      .remote_offset_bytes = 0,
      .length_bytes = static_cast<uint32_t>(std::min<uint64_t>(kProbeBytes, map.length_bytes)),
  };
  const auto answered = read_and_wait(endpoint, operation, timeout);
  return answered ? ok() : Status(answered.error());
}

}  // namespace vmigrate::pager
