#pragma once

#include "transport/socket.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/objects.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

// Setup that is the same for both sides of a connection.

/// The id is not bound to a device yet. Its channel makes it non-blocking.
Result<CmId> create_cm_id(rdma_event_channel* channel, void* context);

/// The id is bound to the device that has `address`. kUnsupported: no device has it; kInvalidArgument:
/// `address` is a wildcard.
Result<CmId> bind_cm_id(rdma_event_channel* channel, SocketAddress address);

/// An address of this host that leads to an active RDMA port.
struct VerbsPlace {
  std::string address;
  std::string device;
  uint32_t port = 0;
};
Result<std::vector<VerbsPlace>> verbs_places();

/// The port that a bound id was given, in host byte order.
uint16_t local_port(rdma_cm_id* id);

/// Sets the options that belong to an id. Call it before the id connects or accepts.
Status apply_options(rdma_cm_id* id, const VerbsOptions& options);

struct QueueSizes {
  uint32_t send_entries = 0;
  uint32_t receive_entries = 0;
};
/// Frames of up to this many bytes travel inside the request.
inline constexpr uint32_t kInlineBytesWanted = 256;

Status create_queue_pair(rdma_cm_id* id, ibv_pd* pd, ibv_cq* send_cq, ibv_cq* receive_cq,
                         const QueueSizes& sizes, QueuePair& qp, uint32_t* inline_bytes_max);

/// Sets how long a peer waits before it tries again if we had no receive posted. Call it once the queue pair
/// is ready to send. The default of the connection manager is over half a second.
void set_receiver_not_ready_timer(ibv_qp* qp);

/// Converts a failure event of an outgoing connection into an error. `reply` is the data that the peer sent
/// with a rejection, if it sent any.
Error connect_error(rdma_cm_event_type type, int status, const wire::HelloReply* reply);

}  // namespace vmigrate::transport
