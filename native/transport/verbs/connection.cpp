#include "transport/verbs/connection.hpp"

#include <sys/eventfd.h>

#include <algorithm>

#include "transport/verbs/host/cm.hpp"

namespace vmigrate::transport {
namespace {

/// Marks the work request ids of sends; those of receives are buffer numbers.
constexpr uint64_t kSendId = uint64_t{1} << 32;

}  // namespace

Result<std::unique_ptr<VerbsConnection>> VerbsConnection::accept(CmId& id, ibv_pd* pd,
                                                                 const DeviceTraits& traits,
                                                                 ibv_comp_channel* completions,
                                                                 const Request& request,
                                                                 const VerbsOptions& options, int wake) {
  std::unique_ptr<VerbsConnection> connection(new VerbsConnection(request.channel, wake));
  connection->id_ = std::move(id);
  rdma_cm_id* raw_id = connection->id_.get();
  // From here on the id's events belong to this connection.
  raw_id->context = connection.get();
  if (Status applied = apply_options(raw_id, options); !applied) return applied.error();
  auto cq = CompletionQueue::create(raw_id->verbs, kQueueEntries, connection.get(), completions);
  if (!cq) return cq.error();
  connection->cq_ = std::move(cq).value();
  if (Status opened = connection->messages_.open(pd); !opened) return opened.error();
  const QueueSizes sizes{.send_entries = MessageBuffers::kSendCount,
                         .receive_entries = MessageBuffers::kReceiveCount};
  if (Status created = create_queue_pair(raw_id, pd, connection->cq_.get(), connection->cq_.get(), sizes,
                                         connection->qp_, &connection->inline_bytes_max_);
      !created)
    return created.error();
  if (Status posted = connection->messages_.post_all_receives(connection->qp_.get()); !posted)
    return posted.error();
  connection->progress();

  rdma_conn_param parameters{};
  parameters.private_data = &request.reply;
  parameters.private_data_len = static_cast<uint8_t>(request.reply_bytes);
  parameters.responder_resources = std::min(request.reads_wanted, traits.reads_as_responder_max);
  parameters.initiator_depth = std::min(request.initiator_depth, traits.reads_as_requester_max);
  parameters.rnr_retry_count = options.rnr_retry_count;
  if (verbs().rdma.accept(raw_id, &parameters) != 0) return system_error("accept RDMA connection");
  set_receiver_not_ready_timer(connection->qp_.get());
  return connection;
}

VerbsConnection::~VerbsConnection() {
  // The peer notices at once that the connection is over.
  if (qp_.get() != nullptr) (void)verbs().rdma.disconnect(id_.get());
}

void VerbsConnection::lost() {
  lost_.store(true, std::memory_order_relaxed);
  // The eventfd orders: a thread that it wakes reads the flag after this write.
  (void)::eventfd_write(wake_, 1);
}

void VerbsConnection::completion_event() {
  cq_.count_event();
  armed_ = false;
}

// Arms first: a request that completes after that raises an event, and one that completed before is found
// here.
void VerbsConnection::progress() {
  if (!armed_) {
    if (::ibv_req_notify_cq(cq_.get(), 0) != 0) return lost();
    armed_ = true;
  }
  std::array<ibv_wc, kQueueEntries> batch;
  const int count = ::ibv_poll_cq(cq_.get(), static_cast<int>(batch.size()), batch.data());
  if (count < 0) return lost();
  for (int i = 0; i < count; ++i) {
    const ibv_wc& completion = batch[static_cast<size_t>(i)];
    if (completion.status != IBV_WC_SUCCESS)
      lost_.store(true, std::memory_order_relaxed);
    else if ((completion.wr_id & kSendId) != 0)
      messages_.release_send(static_cast<uint32_t>(completion.wr_id));
    else
      messages_.arrived(completion.wr_id, completion.byte_len);
  }
}

void VerbsConnection::drop_first_frame() {
  if (!messages_.repost_first(qp_.get())) lost();
}

void VerbsConnection::send(std::span<const std::byte> header, std::span<const std::byte> body) {
  const uint32_t buffer = messages_.fill_send(header, body);
  ibv_sge element = messages_.send_element(buffer);
  ibv_send_wr request{};
  request.wr_id = kSendId | buffer;
  request.sg_list = &element;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  if (element.length <= inline_bytes_max_) request.send_flags |= IBV_SEND_INLINE;
  ibv_send_wr* rejected = nullptr;
  if (::ibv_post_send(qp_.get(), &request, &rejected) != 0) lost();
}

}  // namespace vmigrate::transport
