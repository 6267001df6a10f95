#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::pager {

// The agent's end of the socket that the preload talks to: SOCK_SEQPACKET, so that a record is a message and
// half a message cannot exist. None of these calls waits.

/// Mode 0600. A socket file that nobody listens on any more (ours, from before a crash) is replaced.
Result<UniqueFd> listen_preload(const std::string& path);

struct PreloadPeer {
  UniqueFd connection;
  pid_t pid = -1;  ///< from the kernel, not from the peer
};

/// Invalid connection: none waiting, or it was of another user (and is closed).
Result<PreloadPeer> accept_preload(int listener);

struct PreloadRecord {
  size_t length_bytes = 0;  ///< 0: end of file
  bool is_waiting = false;  ///< nothing was there to read
  bool is_cut = false;      ///< record or descriptors did not fit
  std::vector<UniqueFd> descriptors;
};

Result<PreloadRecord> receive_record(int connection, std::span<std::byte> out);
Status send_ack(int connection, wire::PreloadStatus status);

}  // namespace vmigrate::pager
