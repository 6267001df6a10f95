/*
 * The VM's cgroups. To move a process into one takes the kernel a grace period of RCU, some 16 ms on an idle
 * machine, in which QEMU can load its libraries. So a process of its own moves the one that becomes QEMU, and
 * the keeper opens no file for writing before that has succeeded: no memory, so no guest runs. If it fails,
 * the program is killed.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launcher/launcher.h"

/* Its number may be another process's soon after. */
static bool has_ended(const struct vmg_joining* joining) {
  struct pollfd program = {.fd = joining->program_fd, .events = POLLIN};
  return poll(&program, 1, 0) != 0;
}

static bool join(const char* cgroup, pid_t program) {
  char path[VMG_PATH_BYTES_MAX];
  char number[24];
  snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
  const int length = snprintf(number, sizeof number, "%d", (int)program);
  const int file = open(path, O_WRONLY | O_CLOEXEC);
  const bool is_in = file >= 0 && write(file, number, (size_t)length) == length;
  if (!is_in) vmg_complain_of("cannot join the cgroup", cgroup);
  if (file >= 0) close(file);
  return is_in;
}

bool vmg_start_joining(const struct vmg_options* options, struct vmg_joining* joining) {
  joining->helper_fd = -1;
  if (options->cgroup_count == 0) return true;
  const pid_t helper = fork();
  if (helper > 0) {
    joining->helper = helper;
    joining->helper_fd = vmg_move_above((int)syscall(SYS_pidfd_open, helper, 0));
  }
  if (helper != 0) return helper > 0 && joining->helper_fd >= 0;
  /* What it complains of is output of the program. */
  bool is_in = vmg_give_logs(options);
  for (unsigned i = 0; is_in && i < options->cgroup_count && !has_ended(joining); i++)
    is_in = join(options->cgroups[i], joining->program);
  _exit(is_in ? 0 : 1);
}

bool vmg_has_joined(struct vmg_joining* joining) {
  if (joining->helper > 0) {
    int status = 0;
    pid_t ended;
    do ended = waitpid(joining->helper, &status, 0);
    while (ended < 0 && errno == EINTR);
    joining->has_failed = ended < 0 || status != 0;
    joining->helper = 0;
    close(joining->helper_fd);
    joining->helper_fd = -1;
    if (joining->has_failed) (void)syscall(SYS_pidfd_send_signal, joining->program_fd, SIGKILL, NULL, 0);
  }
  return !joining->has_failed;
}
