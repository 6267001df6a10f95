#pragma once

// Owners of verbs objects. Members of a class are declared in the order device, channel, id, pd, cq, mr, qp
// and so destroyed in the reverse order: a queue pair before the queue that it completes to and the memory
// that it accesses.
//
// Destroying reports whether it worked. It fails only if the device is gone, and the objects with it.

#include <fcntl.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "transport/verbs/host/library.hpp"

namespace vmigrate::transport {

/// One overload for each kind of object.
struct VerbsDeleter {
  void operator()(rdma_event_channel* channel) const { verbs().rdma.destroy_event_channel(channel); }
  void operator()(rdma_cm_id* id) const { (void)verbs().rdma.destroy_id(id); }
  void operator()(ibv_pd* pd) const { (void)verbs().ibv.dealloc_pd(pd); }
  void operator()(ibv_mr* mr) const { (void)verbs().ibv.dereg_mr(mr); }
  void operator()(ibv_comp_channel* channel) const { (void)verbs().ibv.destroy_comp_channel(channel); }
};

using EventChannel = std::unique_ptr<rdma_event_channel, VerbsDeleter>;
/// The destructor waits until every event of the id that was taken is acknowledged.
using CmId = std::unique_ptr<rdma_cm_id, VerbsDeleter>;
using ProtectionDomain = std::unique_ptr<ibv_pd, VerbsDeleter>;
/// After its destruction the device no longer touches the memory.
using MemoryRegion = std::unique_ptr<ibv_mr, VerbsDeleter>;
using CompletionChannel = std::unique_ptr<ibv_comp_channel, VerbsDeleter>;

/// A completion queue and the number of events that were taken from it. Its destruction waits until all are
/// acknowledged. Acknowledging takes a lock, so it is done once, at the end.
class CompletionQueue {
 public:
  CompletionQueue() = default;
  CompletionQueue(CompletionQueue&& other) noexcept
      : cq_(std::exchange(other.cq_, nullptr)), events_(std::exchange(other.events_, 0)) {}
  CompletionQueue& operator=(CompletionQueue&& other) noexcept {
    std::swap(cq_, other.cq_);
    std::swap(events_, other.events_);
    return *this;
  }
  ~CompletionQueue() {
    if (cq_ == nullptr) return;
    if (events_ > 0) verbs().ibv.ack_cq_events(cq_, events_);
    (void)verbs().ibv.destroy_cq(cq_);
  }
  static Result<CompletionQueue> create(ibv_context* device, uint32_t entries, void* context,
                                        ibv_comp_channel* channel) {
    CompletionQueue queue;
    queue.cq_ = verbs().ibv.create_cq(device, static_cast<int>(entries), context, channel, 0);
    if (queue.cq_ == nullptr) return system_error("create completion queue");
    return queue;
  }
  ibv_cq* get() const { return cq_; }
  void count_event() { ++events_; }

 private:
  ibv_cq* cq_ = nullptr;
  unsigned events_ = 0;
};

/// The queue pair of an rdma_cm id. After destroy() the device no longer reads or writes memory for it.
class QueuePair {
 public:
  QueuePair() = default;
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;
  ~QueuePair() { destroy(); }

  /// `attributes.cap.max_inline_data` is a request; the call replaces it by the value that was granted.
  Status create(rdma_cm_id* id, ibv_pd* pd, ibv_qp_init_attr& attributes) {
    ibv_qp_init_attr wanted = attributes;
    if (verbs().rdma.create_qp(id, pd, &attributes) != 0) {
      attributes = wanted;
      attributes.cap.max_inline_data = 0;
      if (verbs().rdma.create_qp(id, pd, &attributes) != 0) return system_error("create queue pair");
    }
    id_ = id;
    return ok();
  }
  void destroy() {
    if (id_ != nullptr) verbs().rdma.destroy_qp(std::exchange(id_, nullptr));
  }
  ibv_qp* get() const { return id_ == nullptr ? nullptr : id_->qp; }

 private:
  rdma_cm_id* id_ = nullptr;
};

inline Status set_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return system_error("fcntl O_NONBLOCK");
  return ok();
}

/// Non-blocking. kUnsupported: this machine has no RDMA device.
inline Result<EventChannel> open_event_channel() {
  if (Status loaded = load_verbs(); !loaded) return loaded.error();
  EventChannel channel(verbs().rdma.create_event_channel());
  if (channel == nullptr) {
    const int error = errno;
    if (error == ENODEV || error == ENOENT)
      return Error{ErrorCode::kUnsupported, error, "this machine has no RDMA device (or no module rdma_ucm)"};
    return system_error("create rdma event channel", error);
  }
  if (Status set = set_nonblocking(channel->fd); !set) return set.error();
  return channel;
}

inline Result<CompletionChannel> open_completion_channel(ibv_context* device) {
  CompletionChannel channel(verbs().ibv.create_comp_channel(device));
  if (channel == nullptr) return system_error("create completion channel");
  if (Status set = set_nonblocking(channel->fd); !set) return set.error();
  return channel;
}

}  // namespace vmigrate::transport
