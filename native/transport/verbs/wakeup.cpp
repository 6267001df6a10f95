// When the owner of a VerbsEndpoint may sleep on its event_fd, and what wakes it.
//
// event_fd joins three descriptors: a flag of ours, the completion channel and the connection manager's
// channel. A completion queue raises one event after it has been armed. So before the owner sleeps, each
// queue that can deliver something is armed, and then polled once more, because a completion that came before
// arming raises no event. Arming and taking the event cost a system call each, so none of this is done for an
// owner that does not sleep.

#include <poll.h>

#include <cerrno>

#include "transport/verbs/endpoint.hpp"

namespace vmigrate::transport {

bool VerbsEndpoint::has_news() const {
  return disconnected_ || table_.has_completions() || !received_.empty();
}

void VerbsEndpoint::set_polled(bool polled) {
  polled_ = polled;
  update_ready();
}

void VerbsEndpoint::update_ready() {
  if (polled_) return;
  if (has_news()) return ready_.set(true);
  rest();
}

void VerbsEndpoint::rest() {
  for (;;) {
    // An event that nobody took would keep the descriptor readable.
    if (event_due_) look_at_descriptors();
    if (disconnected_) break;
    const bool arm_send = first_sequence_ != next_sequence_ && !send_armed_;
    const bool arm_receive = !receive_armed_;
    if (!arm_send && !arm_receive) break;
    int error = 0;
    if (arm_send) error = ::ibv_req_notify_cq(send_cq_.get(), 0);
    if (arm_receive && error == 0) error = ::ibv_req_notify_cq(receive_cq_.get(), 0);
    if (error != 0) {
      disconnect(error);
      break;
    }
    send_armed_ |= arm_send;
    receive_armed_ |= arm_receive;
    progress();
    if (has_news()) break;
  }
  ready_.set(has_news());
}

void VerbsEndpoint::look_at_descriptors() {
  pollfd entries[] = {{completion_channel_->fd, POLLIN, 0}, {event_channel_->fd, POLLIN, 0}};
  if (::poll(entries, 2, 0) <= 0) return;
  if (entries[0].revents != 0) {
    ibv_cq* queue = nullptr;
    void* context = nullptr;
    while (verbs().ibv.get_cq_event(completion_channel_.get(), &queue, &context) == 0) {
      const bool sends = queue == send_cq_.get();
      (sends ? send_cq_ : receive_cq_).count_event();
      (sends ? send_armed_ : receive_armed_) = false;
      event_due_ = false;
    }
  }
  if (entries[1].revents != 0) {
    bool lost = false;
    rdma_cm_event* event = nullptr;
    while (verbs().rdma.get_cm_event(event_channel_.get(), &event) == 0) {
      // The peer has closed, its device or ours is gone, or the path is gone. Each of these ends the
      // connection. An address change is only a hint.
      lost |= event->event != RDMA_CM_EVENT_ADDR_CHANGE && event->event != RDMA_CM_EVENT_ESTABLISHED;
      (void)verbs().rdma.ack_cm_event(event);
    }
    if (lost && !disconnected_) disconnect(ECONNRESET);
  }
}

}  // namespace vmigrate::transport
