/*
 * malloc_trim, which QEMU's RCU thread calls each time it has freed something and has nothing more to do. The
 * call gives the free memory of the heap back to the kernel. While QEMU loads a device state, it frees and
 * allocates all the time: it would fault in again what it has just given back, page by page, and all clones
 * of a fork wait for that. So the agent has the call do nothing from before the state until the VM runs. A
 * QEMU that waits for a state is trimmed as ever, and so is one that runs.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

#include "preload/preload.h"

typedef int (*trim_function)(size_t);

/* NULL before the constructor, and in a C library that has no such call. */
static trim_function next_trim;

void vmg_find_next_trim(void) {
  next_trim = (trim_function)(size_t)dlsym(RTLD_NEXT, "malloc_trim");
}

__attribute__((visibility("default"))) int malloc_trim(size_t pad_bytes) {
  int saved_errno = errno;
  bool is_held = vmg_is_trim_held();
  errno = saved_errno;
  return next_trim == NULL || is_held ? 0 : next_trim(pad_bytes);
}
