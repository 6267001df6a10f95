#include "fetch/probe.hpp"

#include <poll.h>

#include <algorithm>
#include <array>

namespace vmigrate::pager {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr uint64_t kProbeTag = ~uint64_t{0};
/// A device may complete without making the descriptor readable in time, so it is asked at least this often.
constexpr milliseconds kPollMax{20};

/// Waits until the endpoint may have news.
void wait(const transport::Endpoint& endpoint, milliseconds timeout) {
  pollfd waiting{.fd = endpoint.event_fd(), .events = POLLIN, .revents = 0};
  (void)::poll(&waiting, 1, static_cast<int>(std::clamp(timeout, milliseconds(1), kPollMax).count()));
}

}  // namespace

Status probe_path(transport::Endpoint& endpoint, transport::LocalId buffer, const transport::RemoteKey& map,
                  milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  const transport::Operation operation{
      .tag = kProbeTag,
      .local = buffer,
      .local_offset_bytes = 0,
      .remote = map,
      .remote_offset_bytes = 0,
      .length_bytes = static_cast<uint32_t>(std::min<uint64_t>(kProbeBytes, map.length_bytes)),
  };
  bool posted = false;
  for (;;) {
    if (!posted) {
      const transport::PostResult result = endpoint.read({&operation, 1});
      if (result.status == transport::PostStatus::kDisconnected)
        return Error{ErrorCode::kDisconnected, 0, "the first READ of a connection"};
      posted = result.posted == 1;
    }
    std::array<transport::Completion, 1> done;
    if (endpoint.poll(done) == 1) {
      if (done[0].result == transport::OpResult::kDisconnected)
        return Error{ErrorCode::kDisconnected, 0, "the first READ of a connection"};
      return ok();
    }
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
    if (left.count() <= 0) return Error{ErrorCode::kPathStalled, 0, "full-size packets do not arrive"};
    wait(endpoint, left);
  }
}

}  // namespace vmigrate::pager
