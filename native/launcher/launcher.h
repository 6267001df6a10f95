/*
 * Starts QEMU, and stays behind as a small process of its own, the keeper, which is no child of the daemon
 * and outlives it. The keeper holds what QEMU writes within limits (log_spool.c), and opens files for a QEMU
 * that may not open them itself (file_opener.c). Plain C11 on libc alone.
 *
 *   launcher                        keeper
 *     | fork, twice ----------------> |
 *     |                               | fork, the VM's cgroups   cgroups.c
 *     | taps, private root            |   container.c
 *     | user, no capabilities         |
 *     | filter of system calls ------ | -> the notifications of the filter, by SCM_RIGHTS
 *     | exec QEMU                     |
 *     | openat() -------------------> |   opened as root if it is on the list, otherwise left to the kernel
 */
#ifndef VMG_LAUNCHER_H
#define VMG_LAUNCHER_H

#include <stdbool.h>
#include <sys/types.h>

enum { VMG_PATH_BYTES_MAX = 4096, VMG_LOGS_MAX = 4, VMG_LOGS_KEPT_MAX = 16 };
/* The launcher's own descriptors have numbers above it, because the program may want any below. */
enum { VMG_FD_MAX = 1000 };
enum { VMG_MOUNTS_MAX = 32, VMG_CGROUPS_MAX = 8, VMG_TAPS_MAX = 32 };

struct vmg_log {
  int number; /* of the descriptor in the program */
  const char* path;
  int pipe_ends[2];
  int file;
  long long length_bytes;
};

enum vmg_mount_kind { VMG_MOUNT_READ_ONLY, VMG_MOUNT_WRITABLE, VMG_MOUNT_DEVICE };

struct vmg_mount {
  enum vmg_mount_kind kind;
  const char* path;
};

/* What QEMU may reach, and as whom. `uid` 0: it is not contained, and nothing else here counts. */
struct vmg_container {
  uid_t uid; /* also the group */
  /* Absolute. The directory on which the private root is mounted; NULL: QEMU sees the root of the host. */
  const char* root;
  struct vmg_mount mounts[VMG_MOUNTS_MAX];
  unsigned mount_count;
  const char* taps[VMG_TAPS_MAX];
  unsigned tap_count;
  /* Lists the files that the keeper opens (file_opener.c); NULL: none. */
  const char* file_list;
};

struct vmg_options {
  long long log_limit_bytes;
  unsigned kept_log_count;
  const char* mark;
  struct vmg_log logs[VMG_LOGS_MAX];
  unsigned log_count;
  const char* cgroups[VMG_CGROUPS_MAX];
  unsigned cgroup_count;
  struct vmg_container container;
  char** command;
};

/* False: the command line is not understood. The strings are those of `words`. */
bool vmg_take_options(int count, char** words, struct vmg_options* options);

/* Prints "vmigrate-launcher: WHAT: the text of errno". Returns 127, the exit status of a failed start. */
int vmg_complain(const char* what);
/* Prints also what it was about. Returns false. */
bool vmg_complain_of(const char* what, const char* object);

/* Moves `fd` above VMG_FD_MAX, close-on-exec. -1 with errno, and `fd` closed, if there is no number. */
int vmg_move_above(int fd);

/* Makes the pipes, and opens the files, so that a reader finds them before the program runs. False: reported.
 */
bool vmg_open_logs(struct vmg_options* options);
/* Gives the program the writing ends. False: reported. */
bool vmg_give_logs(const struct vmg_options* options);
/* Keeps what comes through the pipe of `log`. False: the pipe has ended, and is closed. */
bool vmg_keep_output(struct vmg_log* log, const struct vmg_options* options);

/* The process that becomes QEMU on its way into the VM's cgroups. */
struct vmg_joining {
  pid_t program;
  int program_fd; /* the same process, by pidfd_open(2) */
  pid_t helper;   /* a child of the keeper; 0: it has ended, or was never there */
  int helper_fd;  /* can be read when the helper has ended; -1: closed */
  bool has_failed;
};

/* Called in the keeper. False: no process, with errno. */
bool vmg_start_joining(const struct vmg_options* options, struct vmg_joining* joining);
/* Waits for the helper. False: the program is not in its cgroups, which is reported, and has been killed. */
bool vmg_has_joined(struct vmg_joining* joining);

/* Called in the process that becomes QEMU. False: reported. */
bool vmg_enter_container(const struct vmg_container* container);

/* Installs the filter in this process, which has no capabilities any more, and sends its notifications
 * through `channel`. From then on this process and its children wait for the keeper whenever they open a
 * file. False: reported. */
bool vmg_send_opens(int channel);
/* Receives them in the keeper, -1 if there are none. */
int vmg_receive_opens(int channel);
/* Answers the call that is there. What is not for reading alone is opened when the program is in its cgroups.
 */
void vmg_answer_open(int opens, const char* file_list, struct vmg_joining* joining);

#endif
