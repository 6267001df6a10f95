#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/unique_fd.hpp"
#include "uffd/page_scan.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::uffd {
namespace {

// Newer than the oldest kernel headers that we build with.
constexpr __u64 kFeatureWpAsync = 1ull << 15;
constexpr unsigned long kDeviceNewUffd = _IO(0xAA, 0x00);

/// A descriptor that also reports faults taken inside the kernel (vhost, system calls on guest memory). A VM
/// cannot be served without them.
UniqueFd open_userfaultfd(int& system_errno) {
  UniqueFd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  if (fd.valid()) return fd;
  system_errno = errno;
  UniqueFd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  if (!device.valid()) return {};
  return UniqueFd(::ioctl(device.get(), kDeviceNewUffd, O_CLOEXEC | O_NONBLOCK));
}

}  // namespace

Support probe() {
  Support support;
  support.pagemap_scan = has_page_scan();
  const UniqueFd fd = open_userfaultfd(support.system_errno);
  if (!fd.valid()) return support;
  uffdio_api api{};
  api.api = UFFD_API;
  if (::ioctl(fd.get(), UFFDIO_API, &api) != 0) {
    support.system_errno = errno;
    return support;
  }
  support.permitted = true;
  support.system_errno = 0;
  support.minor_shmem = (api.features & UFFD_FEATURE_MINOR_SHMEM) != 0;
  support.minor_hugetlbfs = (api.features & UFFD_FEATURE_MINOR_HUGETLBFS) != 0;
  support.wp_async = (api.features & kFeatureWpAsync) != 0;
  return support;
}

}  // namespace vmigrate::uffd
