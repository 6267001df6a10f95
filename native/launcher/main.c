/*
 * Starts a program, see launcher.h. The program keeps this process's pid.
 *
 * The file of --mark exists until everything that the program has written is in its logs. A program whose
 * keeper has been killed gets EPIPE for its output, and ENOSYS when it opens a file; it goes on otherwise.
 * The keeper never waits for anything but its pipes, the program's calls and the disk.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launcher/launcher.h"

enum { MARK_MODE = 0600 };
/* Without the keeper the program loses its output and opens no files. */
static const char KEEPER_OOM_SCORE[] = "-900";

int vmg_complain(const char* what) {
  fprintf(stderr, "vmigrate-launcher: %s: %s\n", what, strerror(errno));
  return 127;
}

bool vmg_complain_of(const char* what, const char* object) {
  char text[VMG_PATH_BYTES_MAX + 64];
  const int reason = errno;
  snprintf(text, sizeof text, "%s %s", what, object);
  errno = reason;
  vmg_complain(text);
  return false;
}

int vmg_move_above(int fd) {
  const int moved = fcntl(fd, F_DUPFD_CLOEXEC, VMG_FD_MAX + 1);
  /* The kernel says EINVAL for a number that RLIMIT_NOFILE does not allow. */
  const int reason = moved < 0 && errno == EINVAL ? EMFILE : errno;
  close(fd);
  errno = reason;
  return moved;
}

static bool is_own(const struct vmg_options* options, int channel, const struct vmg_joining* joining,
                   int fd) {
  if (fd == channel || fd == joining->program_fd || fd == joining->helper_fd) return true;
  for (unsigned i = 0; i < options->log_count; i++)
    if (options->logs[i].pipe_ends[0] == fd || options->logs[i].file == fd) return true;
  return false;
}

/* The keeper has nothing of the program: no descriptor, no signal, no place on a file system, and no words by
 * which somebody could take it for the program. */
static bool become_keeper(struct vmg_options* options, int channel, const struct vmg_joining* joining,
                          char** words, int count) {
  setsid();
  for (int number = 1; number <= SIGRTMAX; number++)
    if (number != SIGKILL && number != SIGSTOP && number != SIGCHLD) signal(number, SIG_IGN);
  prctl(PR_SET_NAME, "vmigrate-keeper");
  const int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (score >= 0) {
    (void)!write(score, KEEPER_OOM_SCORE, sizeof KEEPER_OOM_SCORE - 1);
    close(score);
  }
  for (int fd = 0; fd <= VMG_FD_MAX + 64; fd++)
    if (!is_own(options, channel, joining, fd)) close(fd);
  const char** kept[VMG_LOGS_MAX + 2];
  unsigned kept_count = 0;
  kept[kept_count++] = &options->mark;
  if (options->container.file_list != NULL) kept[kept_count++] = &options->container.file_list;
  for (unsigned i = 0; i < options->log_count; i++) kept[kept_count++] = &options->logs[i].path;
  for (unsigned i = 0; i < kept_count; i++) {
    *kept[i] = strdup(*kept[i]);
    if (*kept[i] == NULL) return false;
  }
  for (int i = 1; i < count; i++) memset(words[i], 0, strlen(words[i]));
  return chdir("/") == 0;
}

/* Serves until every pipe has ended, which is when the program and all that it has started have ended. */
static void serve(struct vmg_options* options, int channel, struct vmg_joining* joining) {
  struct pollfd polled[VMG_LOGS_MAX + 2];
  const unsigned opens_at = options->log_count;
  const unsigned joining_at = opens_at + 1;
  unsigned open_count = options->log_count;
  for (unsigned i = 0; i < options->log_count; i++)
    polled[i] = (struct pollfd){.fd = options->logs[i].pipe_ends[0], .events = POLLIN};
  polled[opens_at] = (struct pollfd){.fd = channel, .events = POLLIN};
  bool has_opens = false;
  while (open_count > 0) {
    polled[joining_at] = (struct pollfd){.fd = joining->helper_fd, .events = POLLIN};
    if (poll(polled, options->log_count + 2, -1) < 0) {
      if (errno == EINTR) continue;
      break;
    }
    for (unsigned i = 0; i < options->log_count; i++) {
      if (polled[i].fd < 0 || polled[i].revents == 0 || vmg_keep_output(&options->logs[i], options)) continue;
      polled[i].fd = -1;
      open_count--;
    }
    if (joining->helper_fd >= 0 && polled[joining_at].revents != 0) (void)vmg_has_joined(joining);
    struct pollfd* opens = &polled[opens_at];
    if (opens->fd < 0 || opens->revents == 0) continue;
    if (!has_opens) {
      opens->fd = vmg_receive_opens(channel);
      close(channel);
      has_opens = true;
    } else if ((opens->revents & POLLIN) != 0) {
      vmg_answer_open(opens->fd, options->container.file_list, joining);
    } else {
      /* No process has the filter any more. */
      close(opens->fd);
      opens->fd = -1;
    }
  }
  unlink(options->mark);
}

/* Two forks, so that the keeper is not a child of the program, which would have to wait for it. */
static bool start_keeper(struct vmg_options* options, int channel, char** words, int count) {
  struct vmg_joining joining = {.program = getpid(), .program_fd = -1};
  if (options->cgroup_count > 0) {
    joining.program_fd = vmg_move_above((int)syscall(SYS_pidfd_open, joining.program, 0));
    if (joining.program_fd < 0) {
      vmg_complain("no descriptor of the own process");
      return false;
    }
  }
  const pid_t middle = fork();
  if (middle == 0) {
    const pid_t last = fork();
    if (last != 0) _exit(last < 0 ? 1 : 0);
    if (!vmg_start_joining(options, &joining)) _exit(1);
    if (become_keeper(options, channel, &joining, words, count)) serve(options, channel, &joining);
    _exit(0);
  }
  if (joining.program_fd >= 0) close(joining.program_fd);
  int status = 0;
  if (middle > 0) {
    while (waitpid(middle, &status, 0) < 0 && errno == EINTR) continue;
    if (status == 0) return true;
  }
  vmg_complain("no process to keep the output");
  return false;
}

int main(int count, char** words) {
  struct vmg_options options = {.kept_log_count = 0};
  if (!vmg_take_options(count, words, &options)) {
    errno = EINVAL;
    return vmg_complain("the command line is not understood");
  }
  if (!vmg_open_logs(&options)) return 127;
  const struct vmg_container* container = &options.container;
  int channel[2] = {-1, -1};
  if (container->file_list != NULL) {
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) != 0) return vmg_complain("no socket");
    for (unsigned end = 0; end < 2; end++) channel[end] = vmg_move_above(channel[end]);
    if (channel[0] < 0 || channel[1] < 0) return vmg_complain("no descriptor");
  }
  const int mark = open(options.mark, O_WRONLY | O_CREAT | O_CLOEXEC, MARK_MODE);
  if (mark >= 0) close(mark);
  if (!start_keeper(&options, channel[0], words, count)) return 127;
  if (!vmg_give_logs(&options)) return 127;
  if (container->uid != 0 && !vmg_enter_container(container)) return 127;
  if (container->file_list != NULL && !vmg_send_opens(channel[1])) return 127;
  execvp(options.command[0], options.command);
  return vmg_complain(options.command[0]);
}
