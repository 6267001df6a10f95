/*
 *   vmigrate-launcher --limit BYTES --keep COUNT --mark PATH --log FD PATH [--log FD PATH]...
 *                     [--env NAME=VALUE]... [--cgroup DIRECTORY]...
 *                     [--uid NUMBER [--files LIST] [--tap NAME]...
 *                       [--root DIRECTORY [--read-only PATH | --writable PATH | --device PATH]...]]
 *                     -- PROGRAM [ARGUMENT]...
 *
 * A variable of --env is set for the program only. COUNT older logs are kept beside each log.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "launcher/launcher.h"

enum { UID_MAX_VALUE = 0x7ffffffe };

static bool number_of(const char* text, long long most, long long* value) {
  char* end = NULL;
  errno = 0;
  *value = strtoll(text, &end, 10);
  return errno == 0 && end != text && *end == '\0' && *value >= 0 && *value <= most;
}

static bool add(const char** list, unsigned* count, unsigned most, const char* word) {
  if (*count == most) return false;
  list[(*count)++] = word;
  return true;
}

static bool take_mount(struct vmg_container* container, const char* name, const char* path) {
  enum vmg_mount_kind kind = VMG_MOUNT_READ_ONLY;
  if (strcmp(name, "--writable") == 0) {
    kind = VMG_MOUNT_WRITABLE;
  } else if (strcmp(name, "--device") == 0) {
    kind = VMG_MOUNT_DEVICE;
  } else if (strcmp(name, "--read-only") != 0) {
    return false;
  }
  if (path[0] != '/' || container->mount_count == VMG_MOUNTS_MAX) return false;
  container->mounts[container->mount_count++] = (struct vmg_mount){.kind = kind, .path = path};
  return true;
}

/* Options with one value. */
static bool take_option(struct vmg_options* options, const char* name, char* word) {
  struct vmg_container* container = &options->container;
  long long value = 0;
  if (strcmp(name, "--limit") == 0) return number_of(word, 1LL << 40, &options->log_limit_bytes);
  if (strcmp(name, "--keep") == 0) {
    const bool is_good = number_of(word, VMG_LOGS_KEPT_MAX, &value);
    options->kept_log_count = (unsigned)value;
    return is_good;
  }
  if (strcmp(name, "--mark") == 0) return (options->mark = word) != NULL;
  if (strcmp(name, "--env") == 0) return putenv(word) == 0;
  if (strcmp(name, "--cgroup") == 0)
    return add(options->cgroups, &options->cgroup_count, VMG_CGROUPS_MAX, word);
  if (strcmp(name, "--uid") == 0) {
    const bool is_good = number_of(word, UID_MAX_VALUE, &value) && value > 0;
    container->uid = (uid_t)value;
    return is_good;
  }
  if (strcmp(name, "--files") == 0) return (container->file_list = word) != NULL;
  if (strcmp(name, "--tap") == 0) return add(container->taps, &container->tap_count, VMG_TAPS_MAX, word);
  if (strcmp(name, "--root") == 0) return (container->root = word)[0] == '/';
  return take_mount(container, name, word);
}

static bool is_whole(const struct vmg_options* options) {
  const struct vmg_container* container = &options->container;
  const bool has_container = container->root != NULL || container->file_list != NULL ||
                             container->tap_count > 0 || container->mount_count > 0;
  return options->log_count > 0 && options->log_limit_bytes > 0 && options->mark != NULL &&
         (container->uid != 0 || !has_container) && (container->root != NULL || container->mount_count == 0);
}

bool vmg_take_options(int count, char** words, struct vmg_options* options) {
  for (int i = 1; i < count; i++) {
    const int left = count - i - 1;
    if (strcmp(words[i], "--") == 0) {
      options->command = words + i + 1;
      return left > 0 && is_whole(options);
    }
    if (left < 1) return false;
    if (strcmp(words[i], "--log") == 0) {
      long long number = 0;
      if (left < 2 || options->log_count == VMG_LOGS_MAX) return false;
      if (!number_of(words[++i], VMG_FD_MAX, &number) || number < 1 || number == STDERR_FILENO) return false;
      options->logs[options->log_count++] =
          (struct vmg_log){.number = (int)number, .path = words[++i], .file = -1};
    } else {
      if (!take_option(options, words[i], words[i + 1])) return false;
      i++;
    }
  }
  return false;
}
