/*
 * Runs a program whose output may never fill a disk. The output goes through pipes to a small process of its
 * own, which keeps the last bytes of it in files of a limited size. That process is no child of the daemon
 * and outlives it, so nothing is lost when the daemon restarts.
 *
 *   vmigrate-spool --limit BYTES --keep COUNT --mark PATH --log FD PATH [--log FD PATH]... [--env
 * NAME=VALUE]...
 *                  -- PROGRAM [ARGUMENT]...
 *
 * The program keeps this process's pid. What it writes to the descriptor FD is appended to the file PATH.
 * When PATH has BYTES, it becomes PATH.1, PATH.1 becomes PATH.2, and so on; COUNT such files are kept beside
 * PATH. FD 1 stands for standard output and standard error. The file of --mark exists until everything that
 * the program has written is in the files. A variable of --env is set for the program only.
 *
 * A program whose spool has been killed gets EPIPE for its output, and goes on without it. The spool never
 * waits for anything but its pipes and the disk: what the disk does not take is dropped.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LOGS_MAX = 4, KEEP_MAX = 16, PATH_MAX_BYTES = 4096, CHUNK_BYTES = 65536, FD_MAX = 1000, MODE = 0600 };

struct log {
  int number;
  const char* path;
  int pipe_ends[2];
  int file;
  long long length_bytes;
};

struct options {
  long long limit_bytes;
  unsigned keep_count;
  const char* mark;
  struct log logs[LOGS_MAX];
  unsigned log_count;
  char** command;
};

static int complain(const char* what) {
  fprintf(stderr, "vmigrate-spool: %s: %s\n", what, strerror(errno));
  return 127;
}

static bool number_of(const char* text, long long most, long long* value) {
  char* end = NULL;
  errno = 0;
  *value = strtoll(text, &end, 10);
  return errno == 0 && end != text && *end == '\0' && *value >= 0 && *value <= most;
}

static bool take_options(int count, char** words, struct options* options) {
  long long value = 0;
  for (int i = 1; i < count; i++) {
    const int left = count - i - 1;
    if (strcmp(words[i], "--") == 0) {
      options->command = words + i + 1;
      return left > 0 && options->log_count > 0 && options->limit_bytes > 0 && options->mark != NULL;
    }
    if (left < 1) return false;
    if (strcmp(words[i], "--limit") == 0) {
      if (!number_of(words[++i], 1LL << 40, &options->limit_bytes)) return false;
    } else if (strcmp(words[i], "--keep") == 0) {
      if (!number_of(words[++i], KEEP_MAX, &value)) return false;
      options->keep_count = (unsigned)value;
    } else if (strcmp(words[i], "--mark") == 0) {
      options->mark = words[++i];
    } else if (strcmp(words[i], "--env") == 0) {
      if (putenv(words[++i]) != 0) return false;
    } else if (strcmp(words[i], "--log") == 0 && left >= 2 && options->log_count < LOGS_MAX) {
      if (!number_of(words[++i], FD_MAX, &value) || value < 1 || value == STDERR_FILENO) return false;
      options->logs[options->log_count++] =
          (struct log){.number = (int)value, .path = words[++i], .file = -1};
    } else {
      return false;
    }
  }
  return false;
}

/* A file that cannot be opened now is tried again with the next output. */
static void open_file(struct log* log) {
  struct stat file;
  log->file = open(log->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, MODE);
  log->length_bytes = log->file >= 0 && fstat(log->file, &file) == 0 ? file.st_size : 0;
}

static void numbered(char* buffer, const char* path, unsigned number) {
  if (number == 0) {
    snprintf(buffer, PATH_MAX_BYTES, "%s", path);
  } else {
    snprintf(buffer, PATH_MAX_BYTES, "%s.%u", path, number);
  }
}

/* A rename needs no space. If it fails all the same, the file is emptied: the limit matters more than old
 * output. */
static void rotate(struct log* log, unsigned keep_count) {
  char from[PATH_MAX_BYTES];
  char to[PATH_MAX_BYTES];
  bool is_renamed = keep_count > 0;
  for (unsigned number = keep_count; number > 0; number--) {
    numbered(from, log->path, number - 1);
    numbered(to, log->path, number);
    if (rename(from, to) != 0 && number == 1) is_renamed = false;
  }
  if (!is_renamed && ftruncate(log->file, 0) == 0) {
    log->length_bytes = 0;
    return;
  }
  close(log->file);
  open_file(log);
}

static void keep(struct log* log, const struct options* options, const char* bytes, size_t count) {
  while (count > 0) {
    if (log->file < 0) open_file(log);
    if (log->file < 0) return;
    if (log->length_bytes >= options->limit_bytes) rotate(log, options->keep_count);
    if (log->file < 0 || log->length_bytes >= options->limit_bytes) return;
    const long long room = options->limit_bytes - log->length_bytes;
    const ssize_t written = write(log->file, bytes, (long long)count < room ? count : (size_t)room);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    log->length_bytes += written;
    bytes += written;
    count -= (size_t)written;
  }
}

/* Reads until every pipe has ended, which is when the program and all that it has started have ended. */
static void spool(struct options* options) {
  static char chunk[CHUNK_BYTES];
  struct pollfd polled[LOGS_MAX];
  unsigned open_count = options->log_count;
  for (unsigned i = 0; i < options->log_count; i++)
    polled[i] = (struct pollfd){.fd = options->logs[i].pipe_ends[0], .events = POLLIN};
  while (open_count > 0) {
    if (poll(polled, options->log_count, -1) < 0 && errno != EINTR) break;
    for (unsigned i = 0; i < options->log_count; i++) {
      if (polled[i].fd < 0 || polled[i].revents == 0) continue;
      polled[i].revents = 0;
      const ssize_t count = read(polled[i].fd, chunk, sizeof chunk);
      if (count > 0) keep(&options->logs[i], options, chunk, (size_t)count);
      if (count > 0 || (count < 0 && (errno == EINTR || errno == EAGAIN))) continue;
      close(polled[i].fd);
      polled[i].fd = -1;
      open_count--;
    }
  }
  for (unsigned i = 0; i < options->log_count; i++)
    if (options->logs[i].file >= 0) close(options->logs[i].file);
  unlink(options->mark);
}

static bool is_own(const struct options* options, int fd) {
  for (unsigned i = 0; i < options->log_count; i++)
    if (options->logs[i].pipe_ends[0] == fd || options->logs[i].file == fd) return true;
  return false;
}

/* The spool has nothing of the program: no descriptor, no signal, no place on a file system, and no words by
 * which somebody could take it for the program. */
static bool become_spool(struct options* options, char** words, int count) {
  setsid();
  for (int number = 1; number <= SIGRTMAX; number++)
    if (number != SIGKILL && number != SIGSTOP && number != SIGCHLD) signal(number, SIG_IGN);
  prctl(PR_SET_NAME, "vmigrate-spool");
  for (int fd = 0; fd <= FD_MAX + 64; fd++)
    if (!is_own(options, fd)) close(fd);
  options->mark = strdup(options->mark);
  bool is_good = options->mark != NULL && chdir("/") == 0;
  for (unsigned i = 0; i < options->log_count; i++) {
    options->logs[i].path = strdup(options->logs[i].path);
    is_good = is_good && options->logs[i].path != NULL;
  }
  for (int i = 1; i < count; i++) memset(words[i], 0, strlen(words[i]));
  return is_good;
}

int main(int count, char** words) {
  struct options options = {.keep_count = 0};
  if (!take_options(count, words, &options)) {
    errno = EINVAL;
    return complain("the command line is not understood");
  }
  for (unsigned i = 0; i < options.log_count; i++) {
    /* Both ends lie above every number that the program may want. */
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return complain("no pipe");
    for (unsigned end = 0; end < 2; end++) {
      options.logs[i].pipe_ends[end] = fcntl(ends[end], F_DUPFD_CLOEXEC, FD_MAX - 100 + 1);
      if (options.logs[i].pipe_ends[end] < 0) {
        /* The kernel says EINVAL for a number that RLIMIT_NOFILE does not allow. */
        if (errno == EINVAL) errno = EMFILE;
        return complain("no descriptor");
      }
      close(ends[end]);
    }
  }
  /* The files exist before the program does, so that a reader finds them. */
  for (unsigned i = 0; i < options.log_count; i++) open_file(&options.logs[i]);
  const int mark = open(options.mark, O_WRONLY | O_CREAT | O_CLOEXEC, MODE);
  if (mark >= 0) close(mark);
  /* Two forks, so that the spool is not a child of the program, which would have to wait for it. */
  const pid_t middle = fork();
  if (middle < 0) return complain("no process for the output");
  if (middle == 0) {
    const pid_t last = fork();
    if (last != 0) _exit(last < 0 ? 1 : 0);
    if (become_spool(&options, words, count)) spool(&options);
    _exit(0);
  }
  int status = 0;
  while (waitpid(middle, &status, 0) < 0 && errno == EINTR) continue;
  if (status != 0) return complain("no process for the output");
  for (unsigned i = 0; i < options.log_count; i++) {
    const int from = options.logs[i].pipe_ends[1];
    if (dup2(from, options.logs[i].number) < 0) return complain("no descriptor");
    if (options.logs[i].number == STDOUT_FILENO && dup2(from, STDERR_FILENO) < 0)
      return complain("no descriptor");
  }
  execvp(options.command[0], options.command);
  return complain(options.command[0]);
}
