#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>

#include "base/unique_fd.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::test {

/// Reserves this many additional huge pages of 2 MiB, and mounts a hugetlbfs, for the duration of a test. The
/// number belongs to the machine, so tests that change it wait for one another, even across processes.
class HugePages {
 public:
  explicit HugePages(unsigned long long count) : lock_(lock_knob()), before_(read_knob()) {
    write_knob(before_ + count);
    is_mounted_ = read_knob() >= before_ + count &&
                  ::mount("hugetlbfs", dir_.path().c_str(), "hugetlbfs", 0, "pagesize=2M") == 0;
  }
  ~HugePages() {
    if (is_mounted_) ::umount2(dir_.path().c_str(), MNT_DETACH);
    write_knob(before_);
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  /// False: no huge pages can be reserved here.
  bool is_mounted() const { return is_mounted_; }
  const std::string& path() const { return dir_.path(); }

 private:
  static constexpr const char* kKnob = "/proc/sys/vm/nr_hugepages";
  static UniqueFd lock_knob() {
    UniqueFd fd(::open(kKnob, O_RDONLY | O_CLOEXEC));
    while (fd.valid() && ::flock(fd.get(), LOCK_EX) != 0 && errno == EINTR) {
    }
    return fd;
  }
  static unsigned long long read_knob() {
    char text[32] = {};
    const UniqueFd fd(::open(kKnob, O_RDONLY | O_CLOEXEC));
    (void)!::read(fd.get(), text, sizeof(text) - 1);
    return std::strtoull(text, nullptr, 10);
  }
  static void write_knob(unsigned long long value) {
    const std::string text = std::to_string(value);
    const UniqueFd fd(::open(kKnob, O_WRONLY | O_CLOEXEC));
    (void)!::write(fd.get(), text.data(), text.size());
  }
  const UniqueFd lock_;  // first, so that it is released after everything else is undone
  const unsigned long long before_;
  TempDir dir_;
  bool is_mounted_ = false;
};

}  // namespace vmigrate::test
