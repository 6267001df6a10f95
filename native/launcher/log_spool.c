/*
 * The output of a program that may never fill a disk. It goes through pipes to the keeper, which appends it
 * to files of a limited size: what the program writes to descriptor FD goes to PATH. When PATH is full, it
 * becomes PATH.1, PATH.1 becomes PATH.2, and so on. FD 1 stands for standard output and standard error. What
 * the disk does not take is dropped.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launcher/launcher.h"

enum { CHUNK_BYTES = 65536, MODE = 0600 };

/* A file that cannot be opened now is tried again with the next output. */
static void open_file(struct vmg_log* log) {
  struct stat file;
  log->file = open(log->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, MODE);
  log->length_bytes = log->file >= 0 && fstat(log->file, &file) == 0 ? file.st_size : 0;
}

static void numbered(char* buffer, const char* path, unsigned number) {
  if (number == 0) {
    snprintf(buffer, VMG_PATH_BYTES_MAX, "%s", path);
  } else {
    snprintf(buffer, VMG_PATH_BYTES_MAX, "%s.%u", path, number);
  }
}

/* A rename needs no space. If it fails all the same, the file is emptied: the limit matters more than old
 * output. */
static void rotate(struct vmg_log* log, unsigned kept_count) {
  char from[VMG_PATH_BYTES_MAX];
  char to[VMG_PATH_BYTES_MAX];
  bool is_renamed = kept_count > 0;
  for (unsigned number = kept_count; number > 0; number--) {
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

static void keep(struct vmg_log* log, const struct vmg_options* options, const char* bytes, size_t count) {
  while (count > 0) {
    if (log->file < 0) open_file(log);
    if (log->file < 0) return;
    if (log->length_bytes >= options->log_limit_bytes) rotate(log, options->kept_log_count);
    if (log->file < 0 || log->length_bytes >= options->log_limit_bytes) return;
    const long long room = options->log_limit_bytes - log->length_bytes;
    const ssize_t written = write(log->file, bytes, (long long)count < room ? count : (size_t)room);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    log->length_bytes += written;
    bytes += written;
    count -= (size_t)written;
  }
}

bool vmg_open_logs(struct vmg_options* options) {
  for (unsigned i = 0; i < options->log_count; i++) {
    struct vmg_log* log = &options->logs[i];
    if (pipe2(log->pipe_ends, O_CLOEXEC) != 0) {
      vmg_complain("no pipe");
      return false;
    }
    for (unsigned end = 0; end < 2; end++) log->pipe_ends[end] = vmg_move_above(log->pipe_ends[end]);
    if (log->pipe_ends[0] < 0 || log->pipe_ends[1] < 0) {
      vmg_complain("no descriptor");
      return false;
    }
    open_file(log);
  }
  return true;
}

bool vmg_give_logs(const struct vmg_options* options) {
  for (unsigned i = 0; i < options->log_count; i++) {
    const struct vmg_log* log = &options->logs[i];
    const bool is_output = log->number == STDOUT_FILENO;
    if (dup2(log->pipe_ends[1], log->number) >= 0 &&
        (!is_output || dup2(log->pipe_ends[1], STDERR_FILENO) >= 0))
      continue;
    vmg_complain("no descriptor");
    return false;
  }
  return true;
}

bool vmg_keep_output(struct vmg_log* log, const struct vmg_options* options) {
  static char chunk[CHUNK_BYTES];
  const ssize_t count = read(log->pipe_ends[0], chunk, sizeof chunk);
  if (count > 0) keep(log, options, chunk, (size_t)count);
  if (count > 0 || (count < 0 && (errno == EINTR || errno == EAGAIN))) return true;
  close(log->pipe_ends[0]);
  log->pipe_ends[0] = -1;
  if (log->file >= 0) close(log->file);
  log->file = -1;
  return false;
}
