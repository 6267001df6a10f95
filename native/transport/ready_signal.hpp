#pragma once

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "base/result.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::transport {

/// An endpoint's event_fd: readable while the watched descriptor is ready or set(true) holds. It is an epoll
/// descriptor, which combines both conditions.
class ReadySignal {
 public:
  Status open() {
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll_.valid()) return system_error("epoll_create");
    event_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event_.valid()) return system_error("eventfd");
    return control(EPOLL_CTL_ADD, event_.get(), EPOLLIN);
  }
  Status watch(int fd) { return control(EPOLL_CTL_ADD, fd, EPOLLIN); }
  void unwatch(int fd) { (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }
  /// Whether room to write into `fd` also makes the signal ready.
  void want_write(int fd, bool wanted) {
    if (wanted == wants_write_) return;
    wants_write_ = wanted;
    (void)control(EPOLL_CTL_MOD, fd, wanted ? EPOLLIN | EPOLLOUT : EPOLLIN);
  }
  void set(bool ready) {
    if (ready == set_) return;
    set_ = ready;
    eventfd_t ignored = 0;
    if (ready)
      (void)::eventfd_write(event_.get(), 1);
    else
      (void)::eventfd_read(event_.get(), &ignored);
  }
  int fd() const { return epoll_.get(); }

 private:
  Status control(int operation, int fd, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), operation, fd, &event) != 0) return system_error("epoll_ctl endpoint");
    return ok();
  }
  UniqueFd epoll_;
  UniqueFd event_;
  bool set_ = false;
  bool wants_write_ = false;
};

}  // namespace vmigrate::transport
