#include "transport/verbs/messages.hpp"

#include <sys/mman.h>

namespace vmigrate::transport {

Status MessageBuffers::open(ibv_pd* pd) {
  // Shared and not inherited: after a fork a private page could move away from under the device.
  void* mapping = ::mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return system_error("map message buffers");
  memory_ = static_cast<std::byte*>(mapping);
  (void)::madvise(mapping, kMemoryBytes, MADV_DONTFORK);
  region_.reset(verbs().ibv.reg_mr(pd, mapping, kMemoryBytes, IBV_ACCESS_LOCAL_WRITE));
  if (region_ == nullptr) return system_error("register message buffers");
  for (uint32_t i = 0; i < kSendCount; ++i) free_sends_[i] = i;
  free_send_count_ = kSendCount;
  return ok();
}

MessageBuffers::~MessageBuffers() {
  region_.reset();
  if (memory_ != nullptr) ::munmap(memory_, kMemoryBytes);
}

int MessageBuffers::post_receive(ibv_qp* qp, uint32_t buffer) const {
  ibv_sge element{};
  element.addr = reinterpret_cast<uintptr_t>(receive_bytes(buffer));
  element.length = kBufferBytes;
  element.lkey = region_->lkey;
  ibv_recv_wr request{};
  request.wr_id = buffer;
  request.sg_list = &element;
  request.num_sge = 1;
  ibv_recv_wr* rejected = nullptr;
  return ::ibv_post_recv(qp, &request, &rejected);
}

Status MessageBuffers::post_all_receives(ibv_qp* qp) {
  for (uint32_t i = 0; i < kReceiveCount; ++i) {
    if (const int error = post_receive(qp, i); error != 0) return system_error("post receive", error);
  }
  return ok();
}

void MessageBuffers::arrived(uint64_t receive_id, uint32_t length_bytes) {
  VMG_CHECK(receive_id < kReceiveCount && arrived_count_ < kReceiveCount);
  arrived_[(arrived_first_ + arrived_count_++) % kReceiveCount] = {static_cast<uint32_t>(receive_id),
                                                                   length_bytes};
}

std::span<const std::byte> MessageBuffers::first() const {
  VMG_CHECK(has_arrived());
  const Arrived& frame = arrived_[arrived_first_];
  return {receive_bytes(frame.buffer), frame.length_bytes};
}

bool MessageBuffers::repost_first(ibv_qp* qp) {
  const uint32_t buffer = arrived_[arrived_first_].buffer;
  arrived_first_ = (arrived_first_ + 1) % kReceiveCount;
  --arrived_count_;
  return qp != nullptr && post_receive(qp, buffer) == 0;
}

uint32_t MessageBuffers::fill_send(std::span<const std::byte> header, std::span<const std::byte> body) {
  VMG_CHECK(send_room() && header.size() + body.size() <= kBufferBytes);
  const uint32_t buffer = free_sends_[--free_send_count_];
  std::memcpy(send_bytes(buffer), header.data(), header.size());
  if (!body.empty()) std::memcpy(send_bytes(buffer) + header.size(), body.data(), body.size());
  send_lengths_[buffer] = static_cast<uint32_t>(header.size() + body.size());
  return buffer;
}

ibv_sge MessageBuffers::send_element(uint32_t buffer) const {
  ibv_sge element{};
  element.addr = reinterpret_cast<uintptr_t>(send_bytes(buffer));
  element.length = send_lengths_[buffer];
  element.lkey = region_->lkey;
  return element;
}

void MessageBuffers::release_send(uint32_t buffer) {
  VMG_CHECK(buffer < kSendCount && free_send_count_ < kSendCount);
  free_sends_[free_send_count_++] = buffer;
}

}  // namespace vmigrate::transport
