#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload/preload.h"

void vmg_complain(const char* format, ...) {
  int saved_errno = errno;
  char line[512];
  static const char prefix[] = "vmigrate-preload: ";
  memcpy(line, prefix, sizeof prefix - 1);
  size_t used = sizeof prefix - 1;
  va_list arguments;
  va_start(arguments, format);
  int written = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
  va_end(arguments);
  if (written > 0)
    used += (size_t)written < sizeof line - used - 1 ? (size_t)written : sizeof line - used - 2;
  line[used++] = '\n';
  /* If stderr cannot be written, the error cannot be reported anywhere else. */
  ssize_t ignored = write(STDERR_FILENO, line, used);
  (void)ignored;
  errno = saved_errno;
}

/* An LD_PRELOAD entry may name this library by the path it was loaded from, by another path to the same file,
 * or by a bare name that the loader searched. */
static bool is_own_entry(const char* entry, const char* own_path) {
  if (strcmp(entry, own_path) == 0) return true;
  if (strchr(entry, '/') == NULL) {
    const char* slash = strrchr(own_path, '/');
    return strcmp(entry, slash ? slash + 1 : own_path) == 0;
  }
  struct stat a;
  struct stat b;
  return stat(entry, &a) == 0 && stat(own_path, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* QEMU's child processes must not be preloaded too. The entries of other libraries stay, in order. */
static bool remove_own_preload_entry(void) {
  const char* value = getenv("LD_PRELOAD");
  Dl_info own;
  if (value == NULL || dladdr((void*)(size_t)&remove_own_preload_entry, &own) == 0 || own.dli_fname == NULL)
    return true;
  char* kept = calloc(1, strlen(value) + 1);
  char* entries = strdup(value);
  if (kept == NULL || entries == NULL) {
    free(kept);
    free(entries);
    vmg_complain("no memory to clean LD_PRELOAD");
    return false;
  }
  char* rest = NULL;
  for (char* entry = strtok_r(entries, ": ", &rest); entry != NULL; entry = strtok_r(NULL, ": ", &rest)) {
    if (is_own_entry(entry, own.dli_fname)) continue;
    if (kept[0] != '\0') strcat(kept, ":");
    strcat(kept, entry);
  }
  int failed = kept[0] != '\0' ? setenv("LD_PRELOAD", kept, 1) : unsetenv("LD_PRELOAD");
  free(kept);
  free(entries);
  if (failed) vmg_complain("cannot clean LD_PRELOAD: %s", strerror(errno));
  return !failed;
}

static bool parse_sync_count(const char* text, unsigned* count) {
  *count = 1;
  if (text == NULL) return true;
  char* end = NULL;
  errno = 0;
  unsigned long value = strtoul(text, &end, 10);
  if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || value < 1 ||
      value > VMG_SYNC_DESCRIPTORS_MAX) {
    vmg_complain(VMG_ENV_SYNC_FDS " is '%s', not a number from 1 to %u", text, VMG_SYNC_DESCRIPTORS_MAX);
    return false;
  }
  *count = (unsigned)value;
  return true;
}

/* Splits `list` in place and keeps pointers into it. A bad list makes every shared file a region: the
 * intended files are then unknown, and none of them may be mapped unreported. */
static bool parse_files(char* list, struct vmg_config* config) {
  bool good = true;
  char* rest = NULL;
  for (char* path = strtok_r(list, "\n", &rest); path != NULL; path = strtok_r(NULL, "\n", &rest)) {
    if (path[0] != '/') {
      vmg_complain(VMG_ENV_FILES ": '%s' is not an absolute path", path);
      good = false;
    } else if (config->region_count == VMG_PRELOAD_REGIONS_MAX) {
      vmg_complain(VMG_ENV_FILES " names more than %u files", VMG_PRELOAD_REGIONS_MAX);
      good = false;
      break;
    } else {
      config->region_paths[config->region_count++] = path;
    }
  }
  if (good && config->region_count == 0) {
    vmg_complain(VMG_ENV_FILES " names no file");
    good = false;
  }
  config->is_every_shared_file_a_region = !good;
  return good;
}

bool vmg_config_take(struct vmg_config* config) {
  const char* files = getenv(VMG_ENV_FILES);
  config->socket_path = strdup(getenv(VMG_ENV_SOCKET));
  char* file_list = strdup(files ? files : "");
  bool good = config->socket_path != NULL && file_list != NULL;
  if (!good) vmg_complain("no memory for the configuration");
  if (good && strlen(config->socket_path) >= sizeof((struct sockaddr_un*)0)->sun_path) {
    vmg_complain(VMG_ENV_SOCKET " is longer than a unix socket's path may be");
    good = false;
  }
  good = good && parse_sync_count(getenv(VMG_ENV_SYNC_FDS), &config->sync_descriptor_count);
  /* The regions are parsed even if something else failed: their mapping must then fail, so they must be
   * known. */
  if (file_list != NULL)
    good = parse_files(file_list, config) && good;
  else
    config->is_every_shared_file_a_region = true;
  const char* is_private = getenv(VMG_ENV_PRIVATE);
  config->is_private = is_private != NULL;
  if (is_private != NULL && strcmp(is_private, "1") != 0) {
    vmg_complain(VMG_ENV_PRIVATE " is '%s', not 1", is_private);
    good = false;
  }
  unsetenv(VMG_ENV_SOCKET);
  unsetenv(VMG_ENV_FILES);
  unsetenv(VMG_ENV_SYNC_FDS);
  unsetenv(VMG_ENV_PRIVATE);
  return remove_own_preload_entry() && good;
}
