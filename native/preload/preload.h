/*
 * The preload: loaded into QEMU by LD_PRELOAD, it gives the agent the userfaultfds of QEMU's address space
 * and tells it where each region file is mapped, before QEMU can touch a byte of it. Plain C11 on libc alone,
 * because it runs inside a process that is not ours.
 *
 *   QEMU (preload)                              agent
 *     | constructor: open userfaultfds            |
 *     | -- HELLO + descriptors (SCM_RIGHTS) ----> |  one SOCK_SEQPACKET connection; a record is a message
 *     | <------------------ ACK ----------------- |
 *     | mmap of a region file                     |
 *     | -- REGION ------------------------------> |  registers the range
 *     | <------------------ ACK ----------------- |  mmap returns only now
 *     | <----------------- TRIM ----------------- |  read when QEMU calls malloc_trim (trim.c)
 *
 * Guarantees. A process without VMIGRATE_PRELOAD_SOCKET is not changed in any way, but that it gets
 * userfaultfds if it may open /dev/userfaultfd (userfaultfd.c). With the variable, a region file is
 * either mapped and known to the agent or not mapped at all: any failure here makes the mapping call fail.
 * Descriptors and connection stay open for the life of the process. If the last userfaultfd were closed, the
 * kernel would answer the guest's faults with zeros.
 *
 * munmap and mremap are not hooked: QEMU keeps guest RAM at its address until QEMU ends, and the agent
 * notices that by end of file.
 */
#ifndef VMG_PRELOAD_H
#define VMG_PRELOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "preload/wire_generated.h"

/* Path of the agent's socket. The preload is active only if this variable is set. */
#define VMG_ENV_SOCKET "VMIGRATE_PRELOAD_SOCKET"
/* Absolute paths of the region files, separated by newlines. */
#define VMG_ENV_FILES "VMIGRATE_PRELOAD_FILES"
/* How many userfaultfds for missing, minor and write-protect faults; 1 if unset. */
#define VMG_ENV_SYNC_FDS "VMIGRATE_PRELOAD_SYNC_FDS"
/* "1": region files are mapped copy-on-write, whatever QEMU asks for. QEMU then still believes that its
 * memory is shared and leaves it out of its migration stream, so a clone can itself be forked. */
#define VMG_ENV_PRIVATE "VMIGRATE_PRELOAD_PRIVATE"

/* One slot is reserved for the asynchronous write-protect descriptor. */
#define VMG_SYNC_DESCRIPTORS_MAX (VMG_PRELOAD_DESCRIPTORS_MAX - 1)
/* Time limit of the agent's answer to one message. After that the mapping call fails. */
#define VMG_AGENT_DEADLINE_MS 30000

struct vmg_config {
  const char* socket_path;
  unsigned sync_descriptor_count;
  unsigned region_count;
  const char* region_paths[VMG_PRELOAD_REGIONS_MAX];
  bool is_every_shared_file_a_region;
  bool is_private;
};

struct vmg_descriptors {
  unsigned count;
  int fds[VMG_PRELOAD_DESCRIPTORS_MAX];
  uint8_t kinds[VMG_PRELOAD_DESCRIPTORS_MAX];
};

/* Prints one line on stderr, "vmigrate-preload: ...". Keeps errno. */
__attribute__((format(printf, 1, 2))) void vmg_complain(const char* format, ...);

/* Reads our variables, then removes them and our own entry of LD_PRELOAD from the environment. The strings of
 * `config` live for ever. False: a variable is invalid (reported on stderr); the environment is cleaned all
 * the same. */
bool vmg_config_take(struct vmg_config* config);

/* Opens the userfaultfds, close-on-exec and non-blocking, with numbers above those that QEMU uses. False: the
 * error was reported on stderr, and nothing is left open. */
bool vmg_descriptors_open(unsigned sync_count, struct vmg_descriptors* descriptors);
void vmg_descriptors_close(struct vmg_descriptors* descriptors);

/* As userfaultfd(2), or by the device if that call is not permitted. */
int vmg_userfaultfd(int flags);

/* Moves `fd` to a high number, close-on-exec, and closes the old number. -1 with errno if there is no room
 * (`fd` is then closed too). */
int vmg_move_high(int fd);

/* Connects, sends the hello and waits for the answer. Returns the connection, or -1 (reported on stderr). */
int vmg_agent_hello(const char* socket_path, const struct vmg_descriptors* descriptors);
/* Reports one mapping and waits for the answer. False: refused, too late or broken (reported on stderr). One
 * caller at a time. */
bool vmg_agent_report(int connection, const struct vmg_preload_region* region);
/* Reads what the agent has said of malloc_trim since the last call, without waiting. True: it must do nothing
 * now. A connection that the agent has lost says that it may work. One caller at a time, as above. */
bool vmg_agent_holds_trim(int connection);

/* malloc_trim calls it. Does not wait. */
bool vmg_is_trim_held(void);
/* Called by the constructor. */
void vmg_find_next_trim(void);

#endif
