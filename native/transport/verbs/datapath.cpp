#include <algorithm>
#include <cerrno>

#include "base/check.hpp"
#include "transport/frames.hpp"
#include "transport/verbs/endpoint.hpp"

namespace vmigrate::transport {
namespace {

/// On the bulk channel one request in this many has its own completion, and so has the last of each chain.
constexpr uint32_t kSignalInterval = 4;

constexpr size_t kCompletionBatch = 32;

OpResult result_of_failure(ibv_wc_status status) {
  switch (status) {
    // Range and rights were checked here before, so the peer has withdrawn the key: its session has ended.
    case IBV_WC_REM_ACCESS_ERR:
      return OpResult::kBadKey;
    case IBV_WC_REM_INV_REQ_ERR:
      return OpResult::kOutOfRange;
    // Our own memory is gone: its file was cut under on-demand paging.
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_QP_OP_ERR:
      return OpResult::kIoError;
    default:
      return OpResult::kDisconnected;
  }
}

int errno_of_failure(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
      return ETIMEDOUT;
    case IBV_WC_REM_ACCESS_ERR:
      return EACCES;
    case IBV_WC_LOC_PROT_ERR:
      return EFAULT;
    default:
      return ECONNRESET;
  }
}

}  // namespace

PostResult VerbsEndpoint::read(std::span<const Operation> operations) {
  return post(OperationTable::Kind::kRead, operations);
}

PostResult VerbsEndpoint::write(std::span<const Operation> operations) {
  return post(OperationTable::Kind::kWrite, operations);
}

PostResult VerbsEndpoint::post(OperationTable::Kind kind, std::span<const Operation> operations) {
  PostResult result;
  if (disconnected_) return {0, PostStatus::kDisconnected};
  for (const Operation& operation : operations) {
    VMG_CHECK(static_cast<size_t>(operation.local) < locals_.size());
    const ChunkedKeys& local = locals_[static_cast<size_t>(operation.local)]->local();
    const uint64_t length = operation.length_bytes;
    VMG_CHECK(length <= wire::kTransferBytesMax && length <= local.length_bytes &&
              operation.local_offset_bytes <= local.length_bytes - length);
    if (table_.full()) {
      result.status = PostStatus::kWouldBlock;
      break;
    }
    const uint8_t slot = table_.add(kind, operation);
    ++result.posted;
    const RemoteKeys::Entry* key = keys_.find_or_add(operation.remote.key);
    if (key == nullptr)
      table_.complete(slot, OpResult::kBadKey, 0);
    else if (key->state == RemoteKeys::State::kOpen)
      start(slot, *key);
    else
      ++waiting_count_;
    if (disconnected_) break;
  }
  ask_for_keys();
  flush_chain();
  update_ready();
  return result;
}

// Makes one request for each piece that lies in one chunk on either side. All carry the operation's sequence.
void VerbsEndpoint::start(uint8_t slot, const RemoteKeys::Entry& key) {
  OperationTable::Slot& entry = table_.slot(slot);
  const Operation& operation = entry.operation;
  const bool write = entry.kind == OperationTable::Kind::kWrite;
  if (const OpResult checked = key.check(operation, write); checked != OpResult::kOk)
    return table_.complete(slot, checked, 0);
  const ChunkedKeys& local = locals_[static_cast<size_t>(operation.local)]->local();
  // A chain never ends in the middle of an operation (see flush_chain()).
  if (chain_count_ + kPiecesMax > kChainMax) flush_chain();
  if (disconnected_) return;
  entry.state = OperationTable::State::kSent;
  in_flight_[next_sequence_ % kInFlightMax] = {false, slot};
  for (uint64_t done = 0; done < operation.length_bytes;) {
    const uint64_t local_offset = operation.local_offset_bytes + done;
    const uint64_t remote_offset = operation.remote_offset_bytes + done;
    const uint64_t bytes = std::min({operation.length_bytes - done, local.left_in_chunk(local_offset),
                                     key.chunks.left_in_chunk(remote_offset)});
    done += bytes;
    ibv_sge element{};
    element.addr = local.address + local_offset;
    element.length = static_cast<uint32_t>(bytes);
    element.lkey = local.key_at(local_offset);
    ibv_send_wr request{};
    request.wr_id = next_sequence_;
    request.opcode = write ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_READ;
    request.wr.rdma.remote_addr = key.chunks.address + remote_offset;
    request.wr.rdma.rkey = key.chunks.key_at(remote_offset);
    if (done == operation.length_bytes) {
      const uint32_t interval = channel_ == Channel::kDemand ? 1 : kSignalInterval;
      if (++unsignalled_count_ >= interval) request.send_flags = IBV_SEND_SIGNALED;
    }
    chain_request(request, element);
  }
  ++next_sequence_;
}

void VerbsEndpoint::chain_frame(std::span<const std::byte> header, std::span<const std::byte> body) {
  if (chain_count_ == kChainMax) flush_chain();
  if (disconnected_) return;
  const uint32_t buffer = messages_.fill_send(header, body);
  in_flight_[next_sequence_ % kInFlightMax] = {true, static_cast<uint8_t>(buffer)};
  const ibv_sge element = messages_.send_element(buffer);
  ibv_send_wr request{};
  request.wr_id = next_sequence_++;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  if (element.length <= inline_bytes_max_) request.send_flags |= IBV_SEND_INLINE;
  chain_request(request, element);
}

void VerbsEndpoint::chain_request(ibv_send_wr& request, const ibv_sge& element) {
  VMG_CHECK(chain_count_ < kChainMax);
  chain_elements_[chain_count_] = element;
  request.sg_list = &chain_elements_[chain_count_];
  request.num_sge = 1;
  if ((request.send_flags & IBV_SEND_SIGNALED) != 0) unsignalled_count_ = 0;
  chain_[chain_count_++] = request;
}

// The last request of a chain always has a completion, so that no request waits for one that never comes. It
// is also the last of its operation, so its completion means that the whole operation is done.
void VerbsEndpoint::flush_chain() {
  if (chain_count_ == 0 || disconnected_) return;
  for (size_t i = 0; i + 1 < chain_count_; ++i) chain_[i].next = &chain_[i + 1];
  chain_[chain_count_ - 1].next = nullptr;
  chain_[chain_count_ - 1].send_flags |= IBV_SEND_SIGNALED;
  unsignalled_count_ = 0;
  chain_count_ = 0;
  ibv_send_wr* rejected = nullptr;
  // The queue has room for all requests that can be outstanding, so a refusal means that the queue pair is
  // broken.
  if (const int error = ::ibv_post_send(qp_.get(), chain_.data(), &rejected); error != 0) disconnect(error);
}

void VerbsEndpoint::ask_for_keys() {
  if (waiting_count_ == 0) return;
  while (!disconnected_ && messages_.send_room()) {
    RemoteKeys::Entry* entry = keys_.next_unasked();
    if (entry == nullptr) return;
    VerbsMap question{};
    question.op = static_cast<uint8_t>(VerbsOp::kMap);
    question.key = entry->key;
    entry->state = RemoteKeys::State::kAsked;
    chain_frame(std::as_bytes(std::span(&question, 1)), {});
  }
}

size_t VerbsEndpoint::poll(std::span<Completion> out) {
  if (!disconnected_) progress();
  const size_t count = table_.take(out);
  if (count > 0)
    empty_polls_ = 0;
  else if (++empty_polls_ % kEmptyPollsPerLook == 0 && !disconnected_)
    look_at_descriptors();
  update_ready();
  return count;
}

PostStatus VerbsEndpoint::send(std::span<const std::byte> message) {
  VMG_CHECK(!message.empty() && message.size() <= wire::kMessageBytesMax);
  if (!disconnected_ && !messages_.send_room()) progress();
  if (disconnected_) return PostStatus::kDisconnected;
  const bool room = messages_.send_room();
  if (room) {
    const wire::FrameHeader header = message_header(message.size());
    chain_frame(std::as_bytes(std::span(&header, 1)), message);
    flush_chain();
  }
  update_ready();
  return room ? PostStatus::kPosted : PostStatus::kWouldBlock;
}

size_t VerbsEndpoint::receive(std::span<std::byte> out) {
  if (received_.empty() && !disconnected_) progress();
  const auto length_bytes = received_.take(out);
  if (!disconnected_ && !length_bytes) disconnect(EMSGSIZE);
  // Frames may have waited for the room that is free now.
  if (!disconnected_ && length_bytes.value_or(0) != 0) take_frames();
  update_ready();
  return length_bytes.value_or(0);
}

void VerbsEndpoint::progress() {
  drain_sends();
  if (!disconnected_) drain_receives();
  if (!disconnected_) take_frames();
  ask_for_keys();
  flush_chain();
}

void VerbsEndpoint::drain_sends() {
  std::array<ibv_wc, kCompletionBatch> batch;
  int count = 0;
  do {
    if (first_sequence_ == next_sequence_) return;
    count = ::ibv_poll_cq(send_cq_.get(), static_cast<int>(batch.size()), batch.data());
    if (count < 0) return disconnect(EIO);
    if (count == 0) return;
    if (send_armed_) event_due_ = true;
    send_armed_ = false;
    for (int i = 0; i < count; ++i) {
      const ibv_wc& completion = batch[static_cast<size_t>(i)];
      if (completion.status != IBV_WC_SUCCESS) return fail(completion);
      complete_through(completion.wr_id);
    }
  } while (count == static_cast<int>(batch.size()));
}

// Requests of one queue pair complete in order, so a good completion covers all requests before it.
void VerbsEndpoint::complete_through(uint64_t sequence) {
  VMG_CHECK(sequence < next_sequence_);
  for (; first_sequence_ <= sequence; ++first_sequence_) {
    const InFlight& done = in_flight_[first_sequence_ % kInFlightMax];
    if (done.is_frame)
      messages_.release_send(done.index);
    else
      table_.complete(done.index, OpResult::kOk, 0);
  }
}

// A failed request ends the queue pair. Earlier requests without a completion may have been done. They are
// reported as lost all the same, because asking for a page twice is cheap and trusting missing bytes is not.
void VerbsEndpoint::fail(const ibv_wc& failure) {
  const uint64_t sequence = failure.wr_id;
  const int error = errno_of_failure(failure.status);
  if (sequence >= first_sequence_ && sequence < next_sequence_) {
    const InFlight& failed = in_flight_[sequence % kInFlightMax];
    const OpResult result = result_of_failure(failure.status);
    if (!failed.is_frame && result != OpResult::kDisconnected) table_.complete(failed.index, result, error);
  }
  disconnect(error);
}

void VerbsEndpoint::drain_receives() {
  std::array<ibv_wc, MessageBuffers::kReceiveCount> batch;
  const int count = ::ibv_poll_cq(receive_cq_.get(), static_cast<int>(batch.size()), batch.data());
  if (count < 0) return disconnect(EIO);
  if (count == 0) return;
  if (receive_armed_) event_due_ = true;
  receive_armed_ = false;
  bool broken = false;
  for (int i = 0; i < count; ++i) {
    const ibv_wc& completion = batch[static_cast<size_t>(i)];
    if (completion.status == IBV_WC_SUCCESS)
      messages_.arrived(completion.wr_id, completion.byte_len);
    else
      broken = true;
  }
  if (broken) disconnect(ECONNRESET);
}

void VerbsEndpoint::take_frames() {
  while (!disconnected_ && messages_.has_arrived()) {
    const auto frame = messages_.first();
    const VerbsFrame kind = kind_of(frame);
    if (kind == VerbsFrame::kMapReply) {
      OpResult result{};
      const RemoteKeys::Entry* entry = keys_.accept(frame, &result);
      if (entry == nullptr) return disconnect(EPROTO);
      start_waiting(*entry, result);
      if (disconnected_) return;
    } else if (kind == VerbsFrame::kMessage) {
      if (received_.full()) return;
      received_.push(message_in(frame));
    } else {
      return disconnect(EPROTO);
    }
    if (!messages_.repost_first(qp_.get())) return disconnect(EIO);
  }
}

// The peer has answered for the key: operations that waited for it are posted, or fail.
void VerbsEndpoint::start_waiting(const RemoteKeys::Entry& key, OpResult result) {
  for (uint8_t i = 0; i < wire::kOutstandingOpsMax && !disconnected_; ++i) {
    const OperationTable::Slot& slot = table_.slot(i);
    if (slot.state != OperationTable::State::kPosted || slot.operation.remote.key != key.key) continue;
    --waiting_count_;
    if (result == OpResult::kOk)
      start(i, key);
    else
      table_.complete(i, result, 0);
  }
}

void VerbsEndpoint::disconnect(int system_errno) {
  disconnected_ = true;
  // The peer notices at once, if it can be reached at all.
  (void)verbs().rdma.disconnect(id_.get());
  // The completions below return local ranges to their owner, so a late answer of the peer must not find them
  // any more.
  qp_.destroy();
  chain_count_ = 0;
  waiting_count_ = 0;
  first_sequence_ = next_sequence_;
  table_.disconnect_all(system_errno);
}

}  // namespace vmigrate::transport
