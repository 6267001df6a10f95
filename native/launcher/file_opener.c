/*
 * Opens files for a QEMU that may not open them itself. A filter of system calls stops each open() and
 * openat() of QEMU, and the kernel asks the keeper (seccomp_unotify(2)). A path on the list is opened by the
 * keeper, as root and in the host's mounts, and QEMU gets the descriptor as the result of its call. Any other
 * call goes on as if nobody had asked: the kernel decides by QEMU's user and QEMU's root.
 *
 * So no file needs another owner or mode, all layers of a disk are covered, and image locks work, because
 * each open makes a file description of its own. The path is read once, and the keeper opens what it has
 * read: a thread of QEMU that changes the string meanwhile changes nothing. Nothing is created: the daemon
 * makes every file, and what QEMU might put into its own directory could lead others astray.
 *
 * The list is a file with a line per path: "r PATH"; "w PATH", also for writing; or "p PATH", for memory that
 * is mapped copy-on-write: QEMU asks for writing, and gets it for reading. It is read anew for each call, so
 * the daemon changes it by a rename, and a restart of the daemon changes nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdalign.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "launcher/launcher.h"

#if defined(__x86_64__)
#define OWN_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define OWN_ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "the filter of system calls is not written for this architecture"
#endif

#ifndef SECCOMP_ADDFD_FLAG_SEND
#define SECCOMP_ADDFD_FLAG_SEND (1UL << 1)
#endif
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

enum { PAGE_BYTES = 4096 };
/* What QEMU may ask for. O_NONBLOCK is set while the file is opened, so that a FIFO holds nobody up. */
static const int FLAGS_KEPT =
    O_ACCMODE | O_APPEND | O_DIRECT | O_DSYNC | O_SYNC | O_NOATIME | O_NOFOLLOW | O_TRUNC;
/* Of these the daemon makes every file, so O_CREAT and O_EXCL are left out. */
static const int FLAGS_TO_WRITE = O_CREAT | O_EXCL | O_TRUNC;

struct asked {
  char path[VMG_PATH_BYTES_MAX];
  int flags;
};

/* Jumps count what lies between, so each rule ends where the next begins: if the number is not `NUMBER`, the
 * answer is left out. */
#define WHEN(NUMBER, ANSWER) \
  BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (NUMBER), 0, 1), BPF_STMT(BPF_RET | BPF_K, (ANSWER))
#define LOAD(FIELD) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, FIELD))
#define REFUSED (SECCOMP_RET_ERRNO | EPERM)
/* The caller does without, as on a kernel that does not know the call. */
#define UNKNOWN (SECCOMP_RET_ERRNO | ENOSYS)

bool vmg_send_opens(int channel) {
  const struct sock_filter code[] = {
      LOAD(arch),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OWN_ARCHITECTURE, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, UNKNOWN),
      LOAD(nr),
      /* Numbers of x32 are other names for the calls below. */
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, UNKNOWN),
      WHEN(SYS_openat, SECCOMP_RET_USER_NOTIF),
      /* What would open or make files without the keeper. */
      WHEN(SYS_openat2, UNKNOWN),
      WHEN(SYS_io_uring_setup, UNKNOWN),
      /* QEMU makes sockets only: nobody who looks into its directory meets links, or directories that change.
       */
      WHEN(SYS_mkdirat, REFUSED),
      WHEN(SYS_mknodat, REFUSED),
      WHEN(SYS_symlinkat, REFUSED),
      WHEN(SYS_linkat, REFUSED),
      WHEN(SYS_renameat2, REFUSED),
#ifdef SYS_renameat
      WHEN(SYS_renameat, REFUSED),
#endif
#ifdef SYS_open
      WHEN(SYS_open, SECCOMP_RET_USER_NOTIF),
      WHEN(SYS_creat, REFUSED),
      WHEN(SYS_mkdir, REFUSED),
      WHEN(SYS_mknod, REFUSED),
      WHEN(SYS_symlink, REFUSED),
      WHEN(SYS_link, REFUSED),
      WHEN(SYS_rename, REFUSED),
#endif
      /* A namespace of users would give capabilities in it. The flags of clone3() cannot be looked at. */
      WHEN(SYS_unshare, REFUSED),
      WHEN(SYS_setns, REFUSED),
      WHEN(SYS_clone3, UNKNOWN),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3),
      LOAD(args[0]),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_NEWUSER, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, REFUSED),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const struct sock_fprog filter = {.len = sizeof code / sizeof code[0], .filter = (struct sock_filter*)code};
  int opens = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);
  if (opens < 0) {
    vmg_complain("no filter of system calls");
    return false;
  }
  alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof opens)] = {0};
  char byte = 0;
  struct iovec body = {.iov_base = &byte, .iov_len = 1};
  struct msghdr message = {
      .msg_iov = &body, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  struct cmsghdr* head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof opens);
  memcpy(CMSG_DATA(head), &opens, sizeof opens);
  const bool is_sent = sendmsg(channel, &message, MSG_NOSIGNAL) == 1;
  if (!is_sent) vmg_complain("no process to open files");
  close(opens);
  close(channel);
  return is_sent;
}

int vmg_receive_opens(int channel) {
  alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  char byte;
  struct iovec body = {.iov_base = &byte, .iov_len = 1};
  struct msghdr message = {
      .msg_iov = &body, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  int opens = -1;
  if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1) return -1;
  const struct cmsghdr* head = CMSG_FIRSTHDR(&message);
  if (head == NULL || head->cmsg_type != SCM_RIGHTS) return -1;
  memcpy(&opens, CMSG_DATA(head), sizeof opens);
  /* Linux 6.6: the caller and the keeper take turns on one processor. */
  (void)ioctl(opens, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (__u64)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
  return opens;
}

/* Reads a string of the caller. False: it is none, or too long. */
static bool read_path(pid_t caller, unsigned long long address, char* path) {
  size_t length = 0;
  while (length < VMG_PATH_BYTES_MAX) {
    /* Up to the end of a page, because what comes after it may not be mapped. */
    const size_t in_page = PAGE_BYTES - (size_t)((address + length) % PAGE_BYTES);
    const size_t left = VMG_PATH_BYTES_MAX - length;
    struct iovec here = {.iov_base = path + length, .iov_len = in_page < left ? in_page : left};
    struct iovec there = {.iov_base = (void*)(size_t)(address + length), .iov_len = here.iov_len};
    const ssize_t count = process_vm_readv(caller, &here, 1, &there, 1, 0);
    if (count <= 0) return false;
    if (memchr(path + length, '\0', (size_t)count) != NULL) return true;
    length += (size_t)count;
  }
  return false;
}

/* How the list says that the path may be opened, or 0. A list that is cut off in its middle has no last line,
 * so its last path is not taken for a longer one. */
static char listed_as(const char* file_list, const char* path) {
  FILE* list = fopen(file_list, "re");
  if (list == NULL) return 0;
  static char line[VMG_PATH_BYTES_MAX + 4];
  char found = 0;
  while (found == 0 && fgets(line, sizeof line, list) != NULL) {
    char* end = strchr(line, '\n');
    if (end == NULL || strlen(line) < 3 || line[1] != ' ') continue;
    *end = '\0';
    if (strcmp(line + 2, path) == 0) found = line[0];
  }
  fclose(list);
  return found;
}

/* Makes of the flags what the list allows. False: nothing. */
static bool bound_flags(struct asked* asked, char listed) {
  const bool is_reading = (asked->flags & O_ACCMODE) == O_RDONLY && (asked->flags & FLAGS_TO_WRITE) == 0;
  if (listed == 'p') asked->flags = (asked->flags & ~(O_ACCMODE | FLAGS_TO_WRITE)) | O_RDONLY;
  return listed == 'w' || listed == 'p' || (listed == 'r' && is_reading);
}

/* Returns a descriptor, or the negated error. */
static int open_for(const struct asked* asked) {
  const int flags = (asked->flags & FLAGS_KEPT) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  const int file = open(asked->path, flags);
  if (file < 0) return -errno;
  struct stat opened;
  /* By a directory of the host QEMU would find the way to all others. */
  const bool is_file = fstat(file, &opened) == 0 &&
                       (S_ISREG(opened.st_mode) || S_ISBLK(opened.st_mode) || S_ISCHR(opened.st_mode));
  if (!is_file || fcntl(file, F_SETFL, asked->flags & (O_APPEND | O_DIRECT | O_NOATIME | O_NONBLOCK)) != 0) {
    close(file);
    return -EACCES;
  }
  return file;
}

static void answer(int opens, const struct seccomp_notif* call, const char* file_list,
                   struct vmg_joining* joining) {
  struct seccomp_notif_resp response = {.id = call->id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
  const bool is_openat = call->data.nr == SYS_openat;
  static struct asked asked;
  asked.flags = (int)call->data.args[is_openat ? 2 : 1];
  const bool is_path = read_path((pid_t)call->pid, call->data.args[is_openat ? 1 : 0], asked.path);
  /* If the caller has ended since, its number may be another process's now: then this is not its path. */
  if (ioctl(opens, SECCOMP_IOCTL_NOTIF_ID_VALID, &call->id) != 0) return;
  const char listed = is_path && asked.path[0] == '/' ? listed_as(file_list, asked.path) : 0;
  if (bound_flags(&asked, listed)) {
    /* Libraries are for reading, and do not wait. The memory of a guest is not. */
    const bool is_ready = listed == 'r' || vmg_has_joined(joining);
    const int file = is_ready ? open_for(&asked) : -EPERM;
    if (file >= 0) {
      const struct seccomp_notif_addfd given = {.id = call->id,
                                                .flags = SECCOMP_ADDFD_FLAG_SEND,
                                                .srcfd = (unsigned)file,
                                                .newfd_flags = (unsigned)(asked.flags & O_CLOEXEC)};
      const int number = ioctl(opens, SECCOMP_IOCTL_NOTIF_ADDFD, &given);
      const int reason = errno;
      close(file);
      if (number >= 0) return;
      response.error = -reason;
    } else {
      response.error = file;
    }
    response.flags = 0;
  } else if ((asked.flags & O_CREAT) != 0 || (asked.flags & O_TMPFILE) == O_TMPFILE) {
    /* The flags are the kernel's copy, so they stay what they are. */
    response.error = -EACCES;
    response.flags = 0;
  }
  /* It fails if the caller has been interrupted or has ended: then nobody waits. */
  (void)ioctl(opens, SECCOMP_IOCTL_NOTIF_SEND, &response);
}

void vmg_answer_open(int opens, const char* file_list, struct vmg_joining* joining) {
  struct seccomp_notif call;
  memset(&call, 0, sizeof call);
  /* ENOENT: the caller has been killed meanwhile. */
  if (ioctl(opens, SECCOMP_IOCTL_NOTIF_RECV, &call) == 0) answer(opens, &call, file_list, joining);
}
