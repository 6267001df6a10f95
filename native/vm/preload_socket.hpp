#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::pager {

// The agent's end of the socket that the preload talks to. It is SOCK_SEQPACKET, so a record is a message and
// half a message cannot exist. None of these calls waits.

/// Mode 0600, and `peer_uid` is its owner. A socket file without a listener (ours, from before a crash) is
/// replaced.
Result<UniqueFd> listen_preload(const std::string& path, uid_t peer_uid);

struct PreloadPeer {
  UniqueFd connection;
  pid_t pid = -1;  ///< from the kernel, not from the peer
};

/// Returns an invalid connection if none is waiting, or if the peer is not `peer_uid` (the connection is then
/// closed).
Result<PreloadPeer> accept_preload(int listener, uid_t peer_uid);

struct PreloadRecord {
  size_t length_bytes = 0;         ///< 0: end of file
  bool is_waiting = false;         ///< there was nothing to read
  bool is_cut = false;             ///< the record or its descriptors did not fit
  bool lacks_descriptors = false;  ///< this process may not open as many files as were sent
  std::vector<UniqueFd> descriptors;
};

Result<PreloadRecord> receive_record(int connection, std::span<std::byte> out);
Status send_ack(int connection, wire::PreloadStatus status);
Status send_trim(int connection, uint32_t hold_ms);

}  // namespace vmigrate::pager
