#include "tests/support/huge_pages.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace vmigrate::test {
namespace {

constexpr const char* kKnob = "/proc/sys/vm/nr_hugepages";

UniqueFd lock_knob() {
  UniqueFd fd(::open(kKnob, O_RDONLY | O_CLOEXEC));
  while (fd.valid() && ::flock(fd.get(), LOCK_EX) != 0 && errno == EINTR) {
  }
  return fd;
}
unsigned long long read_knob() {
  char text[32] = {};
  const UniqueFd fd(::open(kKnob, O_RDONLY | O_CLOEXEC));
  (void)!::read(fd.get(), text, sizeof(text) - 1);
  return std::strtoull(text, nullptr, 10);
}
void write_knob(unsigned long long value) {
  const std::string text = std::to_string(value);
  const UniqueFd fd(::open(kKnob, O_WRONLY | O_CLOEXEC));
  (void)!::write(fd.get(), text.data(), text.size());
}

}  // namespace

HugePages::HugePages(unsigned long long count) : lock_(lock_knob()), before_(read_knob()) {
  write_knob(before_ + count);
  is_mounted_ = read_knob() >= before_ + count &&
                ::mount("hugetlbfs", dir_.path().c_str(), "hugetlbfs", 0, "pagesize=2M") == 0;
}
HugePages::~HugePages() {
  if (is_mounted_) ::umount2(dir_.path().c_str(), MNT_DETACH);
  write_knob(before_);
}

}  // namespace vmigrate::test
