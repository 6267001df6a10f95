#include "multicast/probe.hpp"

#include <poll.h>

#include <algorithm>
#include <vector>

#include "base/thread_util.hpp"
#include "multicast/datagram/header.hpp"
#include "multicast/datagram/limits.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/datagram/writer.hpp"

namespace vmigrate::multicast {
namespace {

using pager::now_ns;

constexpr size_t kCommonPacketBytes = 1500;
constexpr uint64_t kProbeNs = 30 * kMs;
/// A larger probe that has not come within this time after a smaller one does not pass.
constexpr uint64_t kLargerNs = 500 * kMs;

class ProbeVisitor final : public DatagramVisitor {
 public:
  ProbeVisitor(DatagramAuth& auth, uint64_t session, size_t overhead_bytes)
      : auth_(auth), session_(session), overhead_bytes_(overhead_bytes) {}
  void on_datagram(std::span<const std::byte> datagram) override {
    const auto header = parse_header(datagram);
    if (!header || header->session != session_ || header->member != wire::kMulticastProbeMember ||
        header->kind != static_cast<uint8_t>(DatagramKind::kProbe) || !auth_.verify(datagram)) {
      return;
    }
    largest_bytes = std::max(largest_bytes, datagram.size() + overhead_bytes_);
    tried_bytes = std::max(tried_bytes, header->offset);
  }
  size_t largest_bytes = 0;
  uint64_t tried_bytes = 0;

 private:
  DatagramAuth& auth_;
  const uint64_t session_;
  const size_t overhead_bytes_;
};

}  // namespace

Status send_probes(const Group& group, std::chrono::milliseconds duration) {
  auto auth = DatagramAuth::create(group.key);
  if (!auth) return auth.error();
  auto port = open_port(group, Role::kSender);
  if (!port) return port.error();
  // Probes may be sent several times with one key. The clock grows faster than they are sent.
  DatagramWriter writer(*auth.value(), group.session, wire::kMulticastProbeMember,
                        pager::clock_ns(CLOCK_REALTIME));
  const size_t overhead_bytes = port.value()->overhead_bytes();
  const size_t largest_bytes =
      std::min(port.value()->datagram_bytes_max(), sizeof(DatagramHeader) + kPayloadBytesMax);
  std::vector<std::byte> bytes(largest_bytes);
  const uint64_t end_ns = now_ns() + static_cast<uint64_t>(duration.count()) * kMs;
  for (;;) {
    for (const size_t length_bytes :
         {std::min(largest_bytes, kCommonPacketBytes - overhead_bytes), largest_bytes}) {
      const auto datagram = std::span(bytes).first(length_bytes);
      if (!writer.finish(datagram, DatagramKind::kProbe, 0, largest_bytes + overhead_bytes))
        return Error{ErrorCode::kSystem, 0, "AES-GCM"};
      if (auto sent = port.value()->send(datagram, datagram.size()); !sent) return sent;
    }
    const uint64_t at_ns = now_ns();
    if (at_ns >= end_ns) return ok();
    (void)::poll(nullptr, 0, static_cast<int>(std::min(end_ns - at_ns, kProbeNs) / kMs + 1));
  }
}

Result<uint32_t> receive_probes(const Group& group, std::chrono::milliseconds timeout) {
  auto auth = DatagramAuth::create(group.key);
  if (!auth) return auth.error();
  auto port = open_port(group, Role::kReceiver);
  if (!port) return port.error();
  ProbeVisitor visitor(*auth.value(), group.session, port.value()->overhead_bytes());
  uint64_t end_ns = now_ns() + static_cast<uint64_t>(timeout.count()) * kMs;
  for (;;) {
    const size_t before_bytes = visitor.largest_bytes;
    const auto count = port.value()->receive(visitor);
    if (!count) return count.error();
    const uint64_t at_ns = now_ns();
    if (visitor.largest_bytes != 0 && visitor.largest_bytes >= visitor.tried_bytes) break;
    if (before_bytes == 0 && visitor.largest_bytes != 0) end_ns = std::min(end_ns, at_ns + kLargerNs);
    if (at_ns >= end_ns) break;
    if (count.value() != 0) continue;
    pollfd watched{.fd = port.value()->event_fd(), .events = POLLIN, .revents = 0};
    (void)::poll(&watched, 1, static_cast<int>((end_ns - at_ns) / kMs + 1));
  }
  return static_cast<uint32_t>(visitor.largest_bytes);
}

}  // namespace vmigrate::multicast
