#pragma once

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "base/unique_fd.hpp"

namespace vmigrate::pager {

inline uint64_t clock_ns(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}
inline uint64_t now_ns() {
  return clock_ns(CLOCK_MONOTONIC);
}
inline uint64_t thread_cpu_ns() {
  return clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

/// Wakes a thread that sleeps in poll or epoll. Any thread calls signal(). The sleeper calls drain() before
/// it looks for work, so that a signal that comes while it looks is not lost.
class WakeEvent {
 public:
  WakeEvent() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  bool valid() const { return fd_.valid(); }
  int fd() const { return fd_.get(); }
  void signal() const {
    const uint64_t one = 1;
    // EAGAIN: the counter is full, so the descriptor is readable, which is enough.
    while (::write(fd_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
    }
  }
  void drain() const {
    uint64_t count = 0;
    while (::read(fd_.get(), &count, sizeof(count)) < 0 && errno == EINTR) {
    }
  }

 private:
  UniqueFd fd_;
};

/// Blocks signals in threads that are created while this object lives: the process's signals belong to its
/// main thread.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

/// Names the calling thread and sets its nice value. If the kernel refuses (no CAP_SYS_NICE), nothing
/// changes.
void set_up_thread(const char* name, int nice);

}  // namespace vmigrate::pager
