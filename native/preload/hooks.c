#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/preload.h"

_Static_assert(sizeof(off_t) == 8 && sizeof(long) == 8,
               "the raw mmap call below takes a byte offset on 64-bit systems only");

#define EXPORTED __attribute__((visibility("default")))

typedef void* (*mmap_function)(void*, size_t, int, int, int, off_t);

/* Only the constructor writes these, before QEMU has a second thread. */
static bool is_active;
static mmap_function next_mmap;
static struct vmg_config config;
static struct vmg_descriptors descriptors;
static int agent_connection = -1;
static pid_t own_pid;

/* Identity of each region file when last seen, so that a file that is unlinked or renamed later is still
 * known. report_lock guards this and the exchange with the agent. */
static struct {
  bool is_known;
  dev_t device;
  ino_t inode;
} regions[VMG_PRELOAD_REGIONS_MAX];
static bool is_broken;
static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(unsigned index, const struct stat* file) {
  regions[index].is_known = true;
  regions[index].device = file->st_dev;
  regions[index].inode = file->st_ino;
}

/* dlsym may allocate and so call mmap. Until dlsym has returned, and before the constructor, the system call
 * is used. */
static void* map_through(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (next_mmap != NULL) return next_mmap(address, length, protection, flags, fd, offset);
  return (void*)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

/* A QEMU that is contained cannot look at the files by their paths: its root does not show them. It can open
 * them, because another process does that for it. */
static void remember_regions(void) {
  for (unsigned i = 0; i < config.region_count; i++) {
    struct stat named;
    int fd = open(config.region_paths[i], O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    if (fstat(fd, &named) == 0) remember(i, &named);
    close(fd);
  }
}

__attribute__((constructor)) static void start(void) {
  /* If another library interposes mmap, it is still called. */
  next_mmap = (mmap_function)(size_t)dlsym(RTLD_NEXT, "mmap");
  vmg_find_next_trim();
  if (getenv(VMG_ENV_SOCKET) == NULL) return;
  int saved_errno = errno;
  own_pid = getpid();
  bool good = vmg_config_take(&config);
  remember_regions();
  good = good && vmg_descriptors_open(config.sync_descriptor_count, &descriptors);
  if (good) agent_connection = vmg_agent_hello(config.socket_path, &descriptors);
  if (agent_connection < 0) {
    vmg_descriptors_close(&descriptors);
    vmg_complain("guest memory will not be mapped");
  }
  is_broken = agent_connection < 0;
  is_active = true;
  errno = saved_errno;
}

/* While a mapping is reported, the lock is taken, and the answer on its way is the other thread's to read. */
bool vmg_is_trim_held(void) {
  if (!is_active || agent_connection < 0 || getpid() != own_pid) return false;
  if (pthread_mutex_trylock(&report_lock) != 0) return false;
  bool is_held = vmg_agent_holds_trim(agent_connection);
  pthread_mutex_unlock(&report_lock);
  return is_held;
}

/* The paths are looked up at each mapping, because QEMU may create a file just before it maps it. Mapping
 * calls with a regular file are rare. */
static bool is_region(int fd, int flags, struct stat* file) {
  if (fstat(fd, file) != 0 || !S_ISREG(file->st_mode)) return false;
  if (config.is_every_shared_file_a_region && (flags & MAP_SHARED)) return true;
  for (unsigned i = 0; i < config.region_count; i++) {
    struct stat named;
    if (stat(config.region_paths[i], &named) == 0) remember(i, &named);
    if (regions[i].is_known && regions[i].device == file->st_dev && regions[i].inode == file->st_ino)
      return true;
  }
  return false;
}

/* Restores the former state of the address range: nothing, or (MAP_FIXED) the caller's reservation. */
static void take_back(void* mapping, size_t length, int flags) {
  if (flags & MAP_FIXED)
    map_through(mapping, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  else
    munmap(mapping, length);
}

static void* map_region(void* address, size_t length, int protection, int flags, int fd, off_t offset,
                        const struct stat* file) {
  if (is_broken) {
    vmg_complain("a region file is not mapped, because of the failure above");
    errno = EIO;
    return MAP_FAILED;
  }
  if (config.is_private) flags = (flags & ~MAP_TYPE) | MAP_PRIVATE | MAP_NORESERVE;
  void* mapping = map_through(address, length, protection, flags, fd, offset);
  if (mapping == MAP_FAILED) return MAP_FAILED;
  struct vmg_preload_region report = {.magic = VMG_PRELOAD_MAGIC,
                                      .version = VMG_PRELOAD_VERSION,
                                      .op = VMG_PRELOAD_OP_REGION,
                                      .device = file->st_dev,
                                      .inode = file->st_ino,
                                      .base = (uint64_t)(size_t)mapping,
                                      .length = length,
                                      .file_offset = (uint64_t)offset,
                                      .map_flags = (uint64_t)(unsigned)flags};
  if (vmg_agent_report(agent_connection, &report)) return mapping;
  /* Broken for good: a late answer would be mistaken for the answer to the next report. */
  is_broken = true;
  take_back(mapping, length, flags);
  errno = EIO;
  return MAP_FAILED;
}

static void* map_hooked(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (!is_active || fd < 0 || (flags & MAP_ANONYMOUS))
    return map_through(address, length, protection, flags, fd, offset);
  int saved_errno = errno;
  /* Checked before the lock is taken: in a forked child a thread that does not exist there may hold it. */
  bool is_forked = getpid() != own_pid;
  if (!is_forked) pthread_mutex_lock(&report_lock);
  struct stat file;
  bool is_region_file = is_region(fd, flags, &file);
  errno = saved_errno;
  if (!is_region_file) {
    if (!is_forked) pthread_mutex_unlock(&report_lock);
    return map_through(address, length, protection, flags, fd, offset);
  }
  if (is_forked) {
    vmg_complain(
        "a region file is not mapped in a forked process: its userfaultfds belong to the parent (is QEMU "
        "started with -daemonize?)");
    errno = EIO;
    return MAP_FAILED;
  }
  void* mapping = map_region(address, length, protection, flags, fd, offset, &file);
  pthread_mutex_unlock(&report_lock);
  if (mapping != MAP_FAILED) errno = saved_errno;
  return mapping;
}

EXPORTED void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  return map_hooked(address, length, protection, flags, fd, offset);
}

EXPORTED void* mmap64(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  return map_hooked(address, length, protection, flags, fd, offset);
}
