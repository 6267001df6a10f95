#pragma once

#include <fcntl.h>
#include <unistd.h>

#include "base/unique_fd.hpp"
#include "gtest/gtest.h"

namespace vmigrate::test {

/// Replaces a userfaultfd by a directory while it lives: reading returns EISDIR, every ioctl ENOTTY. The
/// userfaultfd itself stays open, so that its ranges stay registered and epoll still reports its events.
class BrokenDescriptor {
 public:
  explicit BrokenDescriptor(int fd) : fd_(fd), kept_(::fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
    const UniqueFd directory(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    EXPECT_EQ(::dup3(directory.get(), fd_, O_CLOEXEC), fd_);
  }
  ~BrokenDescriptor() { EXPECT_EQ(::dup3(kept_.get(), fd_, O_CLOEXEC), fd_); }
  BrokenDescriptor(const BrokenDescriptor&) = delete;
  BrokenDescriptor& operator=(const BrokenDescriptor&) = delete;

 private:
  const int fd_;
  const UniqueFd kept_;
};

}  // namespace vmigrate::test
