#include "base/thread_util.hpp"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>

namespace vmigrate::pager {

void set_up_thread(const char* name, int nice) {
  ::pthread_setname_np(::pthread_self(), name);
  const auto thread_id = static_cast<id_t>(::syscall(SYS_gettid));
  (void)::setpriority(PRIO_PROCESS, thread_id, nice);
}

}  // namespace vmigrate::pager
