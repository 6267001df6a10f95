#include "transport/verbs/host/cm.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cerrno>

#include "transport/hello.hpp"

namespace vmigrate::transport {
namespace {

/// 0.64 ms, in InfiniBand's encoding.
constexpr uint8_t kReceiverNotReadyTimer = 12;
/// InfiniBand's reason codes for a rejection.
constexpr int kRejectedNobodyListens = 8;

}  // namespace

Result<CmId> create_cm_id(rdma_event_channel* channel, void* context) {
  rdma_cm_id* id = nullptr;
  if (verbs().rdma.create_id(channel, &id, context, RDMA_PS_TCP) != 0)
    return system_error("create rdma_cm id");
  return CmId(id);
}

Result<CmId> bind_cm_id(rdma_event_channel* channel, SocketAddress address) {
  auto id = create_cm_id(channel, nullptr);
  if (!id) return id.error();
  int reuse = 1;
  if (verbs().rdma.set_option(id.value().get(), RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &reuse,
                              sizeof reuse) != 0)
    return system_error("set RDMA address reuse");
  if (verbs().rdma.bind_addr(id.value().get(), reinterpret_cast<sockaddr*>(&address.storage)) != 0) {
    if (errno == ENODEV) return Error{ErrorCode::kUnsupported, ENODEV, "no RDMA device has this address"};
    return system_error("bind RDMA data address");
  }
  if (id.value()->verbs == nullptr)
    return Error{ErrorCode::kInvalidArgument, 0, "an RDMA data address must be that of one device"};
  return id;
}

uint16_t local_port(rdma_cm_id* id) {
  const sockaddr* address = ::rdma_get_local_addr(id);
  return ntohs(address->sa_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(address)->sin6_port
                                              : reinterpret_cast<const sockaddr_in*>(address)->sin_port);
}

Status apply_options(rdma_cm_id* id, const VerbsOptions& options) {
  uint8_t timeout = options.ack_timeout_exponent;
  // A kernel before 5.3 does not know the option and computes a timeout from the path.
  if (verbs().rdma.set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &timeout, sizeof timeout) !=
          0 &&
      errno != ENOSYS && errno != EINVAL)
    return system_error("set RDMA acknowledgement timeout");
  return ok();
}

Status create_queue_pair(rdma_cm_id* id, ibv_pd* pd, ibv_cq* send_cq, ibv_cq* receive_cq,
                         const QueueSizes& sizes, QueuePair& qp, uint32_t* inline_bytes_max) {
  ibv_qp_init_attr attributes{};
  attributes.qp_type = IBV_QPT_RC;
  attributes.send_cq = send_cq;
  attributes.recv_cq = receive_cq;
  attributes.cap.max_send_wr = sizes.send_entries;
  attributes.cap.max_recv_wr = sizes.receive_entries;
  attributes.cap.max_send_sge = 1;
  attributes.cap.max_recv_sge = 1;
  attributes.cap.max_inline_data = kInlineBytesWanted;
  if (Status created = qp.create(id, pd, attributes); !created) return created;
  *inline_bytes_max = attributes.cap.max_inline_data;
  return ok();
}

void set_receiver_not_ready_timer(ibv_qp* qp) {
  ibv_qp_attr attributes{};
  attributes.min_rnr_timer = kReceiverNotReadyTimer;
  // A failure only costs latency when messages pile up.
  (void)verbs().ibv.modify_qp(qp, &attributes, IBV_QP_MIN_RNR_TIMER);
}

Error connect_error(rdma_cm_event_type type, int status, const wire::HelloReply* reply) {
  switch (type) {
    case RDMA_CM_EVENT_REJECTED:
      if (reply != nullptr) {
        if (const Status checked = check_reply(*reply, wire::HelloStatus::kOk); !checked)
          return checked.error();
        return Error{ErrorCode::kProtocol, 0, "peer rejected the connection with status OK"};
      }
      if (status == kRejectedNobodyListens || status == -ECONNREFUSED)
        return system_error("connect to RDMA data port", ECONNREFUSED);
      return system_error("RDMA connection rejected", ECONNRESET);
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
      return system_error("RDMA device removed", ECONNRESET);
    case RDMA_CM_EVENT_ADDR_ERROR:
      return status == -ENODEV
                 ? Error{ErrorCode::kUnsupported, ENODEV, "no RDMA device leads to the peer's address"}
                 : system_error("resolve RDMA address", status < 0 ? -status : EHOSTUNREACH);
    case RDMA_CM_EVENT_ROUTE_ERROR:
    case RDMA_CM_EVENT_UNREACHABLE:
      return system_error("reach RDMA peer", status < 0 ? -status : EHOSTUNREACH);
    default:
      return system_error("connect to RDMA peer", status < 0 ? -status : ECONNRESET);
  }
}

}  // namespace vmigrate::transport
