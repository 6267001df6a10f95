#pragma once

#include <fcntl.h>
#include <unistd.h>

#include "base/unique_fd.hpp"
#include "gtest/gtest.h"

namespace vmigrate::test {

/// A directory in the place of a userfaultfd, while it lives: reading says EISDIR, every ioctl ENOTTY. The
/// userfaultfd itself stays open, so that its ranges stay registered and epoll still tells of its events.
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
