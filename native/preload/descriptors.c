#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "preload/preload.h"

/* Newer than the headers of the oldest kernel that we build on. The numbers are the kernel's ABI. */
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#define WRITE_PROTECT_FEATURES \
  (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED)
/* Post-copy is impossible without these two. */
#define SYNC_FEATURES_NEEDED (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM)
#define SYNC_FEATURES                                                                     \
  (SYNC_FEATURES_NEEDED | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS | \
   UFFD_FEATURE_THREAD_ID | WRITE_PROTECT_FEATURES)
#define ASYNC_FEATURES (UFFD_FEATURE_WP_ASYNC | WRITE_PROTECT_FEATURES)

/* High enough that QEMU's descriptor numbers do not change, low enough that the kernel's table of descriptors
 * stays small. */
#define HIGH_DESCRIPTOR 960
#define DESCRIPTORS_OF_OURS (VMG_PRELOAD_DESCRIPTORS_MAX + 1)

int vmg_move_high(int fd) {
  int lowest = HIGH_DESCRIPTOR;
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < HIGH_DESCRIPTOR + DESCRIPTORS_OF_OURS)
    lowest = limit.rlim_cur > 2 * DESCRIPTORS_OF_OURS ? (int)limit.rlim_cur - DESCRIPTORS_OF_OURS : 0;
  int moved = fcntl(fd, F_DUPFD_CLOEXEC, lowest);
  int saved_errno = errno;
  close(fd);
  errno = saved_errno;
  return moved;
}

/* UFFDIO_API works once per descriptor and fixes its features. So the kernel's features are queried on a
 * descriptor that is then closed. */
static bool query_features(uint64_t* features) {
  int fd = vmg_userfaultfd(O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    vmg_complain("userfaultfd: %s", strerror(errno));
    return false;
  }
  struct uffdio_api api = {.api = UFFD_API, .features = 0};
  bool good = ioctl(fd, UFFDIO_API, &api) == 0;
  if (!good) vmg_complain("UFFDIO_API: %s", strerror(errno));
  close(fd);
  *features = api.features;
  return good;
}

static bool add_descriptor(struct vmg_descriptors* descriptors, uint64_t features, uint8_t kind) {
  int fd = vmg_userfaultfd(O_CLOEXEC | O_NONBLOCK);
  struct uffdio_api api = {.api = UFFD_API, .features = features};
  if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0) {
    vmg_complain("userfaultfd with features %#llx: %s", (unsigned long long)features, strerror(errno));
    if (fd >= 0) close(fd);
    return false;
  }
  fd = vmg_move_high(fd);
  if (fd < 0) {
    vmg_complain("no descriptor number left: %s", strerror(errno));
    return false;
  }
  descriptors->fds[descriptors->count] = fd;
  descriptors->kinds[descriptors->count++] = kind;
  return true;
}

bool vmg_descriptors_open(unsigned sync_count, struct vmg_descriptors* descriptors) {
  descriptors->count = 0;
  uint64_t features = 0;
  if (!query_features(&features)) return false;
  if ((features & SYNC_FEATURES_NEEDED) != SYNC_FEATURES_NEEDED) {
    vmg_complain("this kernel has no missing and minor faults on shared memory (features %#llx)",
                 (unsigned long long)features);
    return false;
  }
  bool good = true;
  for (unsigned i = 0; good && i < sync_count; i++)
    good = add_descriptor(descriptors, features & SYNC_FEATURES, VMG_PRELOAD_DESCRIPTOR_SYNC);
  if (good && (features & UFFD_FEATURE_WP_ASYNC))
    good = add_descriptor(descriptors, features & ASYNC_FEATURES, VMG_PRELOAD_DESCRIPTOR_ASYNC_WP);
  if (!good) vmg_descriptors_close(descriptors);
  return good;
}

void vmg_descriptors_close(struct vmg_descriptors* descriptors) {
  for (unsigned i = 0; i < descriptors->count; i++) close(descriptors->fds[i]);
  descriptors->count = 0;
}
