#pragma once

#include "transport/socket.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/objects.hpp"
#include "transport/verbs/options.hpp"

namespace vmigrate::transport {

// What both sides of a connection set up in the same way.

/// Bound to no device yet. Non-blocking by its channel.
Result<CmId> create_cm_id(rdma_event_channel* channel, void* context);

/// Bound to the device that has `address`. kUnsupported: none has; kInvalidArgument: `address` is a wildcard.
Result<CmId> bind_cm_id(rdma_event_channel* channel, SocketAddress address);

/// An address of this host that leads to an active RDMA port.
struct VerbsPlace {
  std::string address;
  std::string device;
  uint32_t port = 0;
};
Result<std::vector<VerbsPlace>> verbs_places();

/// The port that a bound id has got, in host byte order.
uint16_t local_port(rdma_cm_id* id);

/// The options that belong to an id: before it connects or accepts.
Status apply_options(rdma_cm_id* id, const VerbsOptions& options);

struct QueueSizes {
  uint32_t send_entries = 0;
  uint32_t receive_entries = 0;
};
/// Frames up to so many bytes travel inside the request.
inline constexpr uint32_t kInlineBytesWanted = 256;

Status create_queue_pair(rdma_cm_id* id, ibv_pd* pd, ibv_cq* send_cq, ibv_cq* receive_cq,
                         const QueueSizes& sizes, QueuePair& qp, uint32_t* inline_bytes_max);

/// How long a peer waits before it tries again when we had no receive posted. Once the queue pair is ready to
/// send; the default of the connection manager is over half a second.
void set_receiver_not_ready_timer(ibv_qp* qp);

/// The error that an unhappy event of an outgoing connection stands for. `reply` is what the peer said with a
/// rejection, if it said anything.
Error connect_error(rdma_cm_event_type type, int status, const wire::HelloReply* reply);

}  // namespace vmigrate::transport
