#include "multicast/verbs/queues.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>

#include "transport/verbs/memory.hpp"

namespace vmigrate::multicast {

using transport::verbs;

Status DatagramQueues::open(rdma_cm_id* id, size_t datagram_bytes_max) {
  const auto traits = transport::query_device(id->verbs);
  if (!traits) return traits.error();
  receive_count_ = std::min(kReceivesMax, traits.value().queue_entries_max);
  if (traits.value().queue_entries_max < kSendsMax)
    return Error{ErrorCode::kUnsupported, 0, "the RDMA device's queues are too short"};
  pd_.reset(verbs().ibv.alloc_pd(id->verbs));
  if (pd_ == nullptr) return system_error("allocate protection domain");
  auto channel = transport::open_completion_channel(id->verbs);
  if (!channel) return channel.error();
  completions_ = std::move(channel).value();
  auto sends = transport::CompletionQueue::create(id->verbs, kSendsMax, nullptr, nullptr);
  if (!sends) return sends.error();
  send_cq_ = std::move(sends).value();
  auto receives = transport::CompletionQueue::create(id->verbs, receive_count_, nullptr, completions_.get());
  if (!receives) return receives.error();
  receive_cq_ = std::move(receives).value();

  slot_bytes_ = (kRouteHeaderBytes + datagram_bytes_max + 63) / 64 * 64;
  buffer_.resize((receive_count_ + kSendsMax) * slot_bytes_);
  memory_.reset(verbs().ibv.reg_mr(pd_.get(), buffer_.data(), buffer_.size(), IBV_ACCESS_LOCAL_WRITE));
  if (memory_ == nullptr) return system_error("register the buffers of a multicast");

  ibv_qp_init_attr attributes{};
  attributes.qp_type = IBV_QPT_UD;
  attributes.send_cq = send_cq_.get();
  attributes.recv_cq = receive_cq_.get();
  attributes.cap.max_send_wr = kSendsMax;
  attributes.cap.max_recv_wr = receive_count_;
  attributes.cap.max_send_sge = attributes.cap.max_recv_sge = 1;
  if (auto created = qp_.create(id, pd_.get(), attributes); !created) return created;
  std::vector<uint64_t> slots(receive_count_);
  std::iota(slots.begin(), slots.end(), 0);
  for (size_t at = 0; at < slots.size(); at += kPolledMax) {
    const size_t count = std::min(kPolledMax, slots.size() - at);
    if (auto posted = post_receives(std::span(slots).subspan(at, count)); !posted) return posted;
  }
  return arm();
}

Status DatagramQueues::post_receives(std::span<const uint64_t> slots) {
  std::array<ibv_sge, kPolledMax> parts;
  std::array<ibv_recv_wr, kPolledMax> requests;
  for (size_t i = 0; i < slots.size(); ++i) {
    parts[i] = {reinterpret_cast<uint64_t>(slot_bytes(slots[i])), static_cast<uint32_t>(slot_bytes_),
                memory_->lkey};
    requests[i] = {.wr_id = slots[i], .next = nullptr, .sg_list = &parts[i], .num_sge = 1};
    if (i != 0) requests[i - 1].next = &requests[i];
  }
  ibv_recv_wr* bad = nullptr;
  const int error = ::ibv_post_recv(qp_.get(), requests.data(), &bad);
  return error == 0 ? ok() : Status(system_error("post receives", error));
}

Result<size_t> DatagramQueues::poll(ibv_cq* queue, std::span<ibv_wc> out) const {
  const int count = ::ibv_poll_cq(queue, static_cast<int>(out.size()), out.data());
  if (count < 0) return system_error("poll a completion queue", EIO);
  for (int i = 0; i < count; ++i)
    if (out[static_cast<size_t>(i)].status != IBV_WC_SUCCESS)
      return Error{ErrorCode::kDisconnected, 0, "the RDMA device has given up the multicast"};
  return static_cast<size_t>(count);
}

Status DatagramQueues::arm() {
  const int error = ::ibv_req_notify_cq(receive_cq_.get(), 0);
  return error == 0 ? ok() : Status(system_error("arm a completion queue", error));
}

/// What arrives between a look and the arming raises no event, so it looks once more after arming.
Result<size_t> DatagramQueues::poll_receives(std::span<ibv_wc> out) {
  auto count = poll(receive_cq_.get(), out);
  if (!count || count.value() != 0) return count;
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  while (verbs().ibv.get_cq_event(completions_.get(), &queue, &context) == 0) receive_cq_.count_event();
  if (auto armed = arm(); !armed) return armed.error();
  return poll(receive_cq_.get(), out);
}

DatagramQueues::Arrived DatagramQueues::arrived(const ibv_wc& completion) const {
  const std::byte* bytes = buffer_.data() + completion.wr_id * slot_bytes_;
  Arrived result;
  if (completion.byte_len < kRouteHeaderBytes) return result;
  result.datagram = {bytes + kRouteHeaderBytes, completion.byte_len - kRouteHeaderBytes};
  if ((completion.wc_flags & IBV_WC_GRH) != 0) result.route_header = {bytes, kRouteHeaderBytes};
  result.from_queue_pair = completion.src_qp;
  result.from_local_id = completion.slid;
  return result;
}

/// False: none has become free in time.
Result<bool> DatagramQueues::await_free_send(std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    std::array<ibv_wc, kPolledMax> completions;
    const auto count = poll(send_cq_.get(), completions);
    if (!count) return count.error();
    free_sends_ += count.value();
    if (free_sends_ != 0) return true;
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

Status DatagramQueues::send(std::span<const std::byte> bytes, size_t datagram_bytes, const Destination& to,
                            std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!bytes.empty()) {
    const auto is_free = await_free_send(deadline);
    if (!is_free) return is_free.error();
    if (!is_free.value()) return ok();
    const size_t chain_bytes = std::min(bytes.size(), std::min(free_sends_, kChainMax) * datagram_bytes);
    const auto posted = post_sends(bytes.first(chain_bytes), datagram_bytes, to);
    if (!posted) return posted.error();
    if (posted.value() == 0) return ok();
    bytes = bytes.subspan(std::min(bytes.size(), posted.value() * datagram_bytes));
  }
  return ok();
}

/// Posts a chain, at most as long as there are free buffers, and returns how many the device has room for.
Result<size_t> DatagramQueues::post_sends(std::span<const std::byte> bytes, size_t datagram_bytes,
                                          const Destination& to) {
  std::array<ibv_sge, kChainMax> parts;
  std::array<ibv_send_wr, kChainMax> requests;
  size_t count = 0;
  for (size_t at = 0; at < bytes.size(); at += datagram_bytes, ++count) {
    const auto datagram = bytes.subspan(at, std::min(datagram_bytes, bytes.size() - at));
    std::byte* buffer = slot_bytes(receive_count_ + (next_send_ + count) % kSendsMax);
    std::memcpy(buffer, datagram.data(), datagram.size());
    parts[count] = {reinterpret_cast<uint64_t>(buffer), static_cast<uint32_t>(datagram.size()),
                    memory_->lkey};
    ibv_send_wr& request = requests[count] = {};
    request.sg_list = &parts[count];
    request.num_sge = 1;
    request.opcode = IBV_WR_SEND;
    request.send_flags = IBV_SEND_SIGNALED;
    request.wr.ud.ah = to.handle;
    request.wr.ud.remote_qpn = to.queue_pair;
    request.wr.ud.remote_qkey = to.key;
    if (count != 0) requests[count - 1].next = &request;
  }
  ibv_send_wr* bad = nullptr;
  const int error = ::ibv_post_send(qp_.get(), requests.data(), &bad);
  if (error != 0 && error != ENOMEM) return system_error("post datagrams", error);
  const size_t posted = error == 0 ? count : static_cast<size_t>(bad - requests.data());
  next_send_ = (next_send_ + posted) % kSendsMax;
  free_sends_ -= posted;
  return posted;
}

}  // namespace vmigrate::multicast
