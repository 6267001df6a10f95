#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "preload/preload.h"

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits for `events` until the deadline. Signals that QEMU takes on this thread do not end the wait early. */
static bool wait_for(int connection, short events, int64_t deadline_ms) {
  for (;;) {
    int64_t left_ms = deadline_ms - now_ms();
    struct pollfd entry = {.fd = connection, .events = events};
    int ready = poll(&entry, 1, left_ms > 0 ? (int)left_ms : 0);
    if (ready > 0) return true;
    if (ready == 0) errno = ETIMEDOUT;
    if (ready == 0 || errno != EINTR) return false;
  }
}

static bool send_record(int connection, struct msghdr* record, size_t size, int64_t deadline_ms) {
  for (;;) {
    ssize_t sent = sendmsg(connection, record, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == (ssize_t)size) return true;
    if (sent >= 0) errno = EMSGSIZE;
    if (sent >= 0 || (errno != EAGAIN && errno != EINTR)) return false;
    if (!wait_for(connection, POLLOUT, deadline_ms)) return false;
  }
}

/* Until then malloc_trim does nothing. The time bounds what an agent can forget: memory that a VM has freed
 * goes back to the kernel at last. */
static int64_t trim_held_until_ms;

/* False: the record is none of its kind. */
static bool take_trim(const void* record, ssize_t size) {
  struct vmg_preload_trim trim;
  if (size != sizeof trim) return false;
  memcpy(&trim, record, sizeof trim);
  if (trim.magic != VMG_PRELOAD_MAGIC || trim.op != VMG_PRELOAD_OP_TRIM) return false;
  trim_held_until_ms = trim.hold_ms == 0 ? 0 : now_ms() + trim.hold_ms;
  return true;
}

bool vmg_agent_holds_trim(int connection) {
  for (;;) {
    unsigned char record[sizeof(struct vmg_preload_trim)];
    ssize_t size = recv(connection, record, sizeof record, MSG_DONTWAIT | MSG_TRUNC);
    if (size > 0) {
      take_trim(record, size);
      continue;
    }
    if (size < 0 && errno == EINTR) continue;
    if (size == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) trim_held_until_ms = 0;
    return trim_held_until_ms != 0 && now_ms() < trim_held_until_ms;
  }
}

static bool receive_ack(int connection, int64_t deadline_ms) {
  struct vmg_preload_ack ack;
  unsigned char record[sizeof(struct vmg_preload_trim)] = {0};
  _Static_assert(sizeof record >= sizeof ack, "each record of the agent fits");
  ssize_t received;
  do {
    if (!wait_for(connection, POLLIN, deadline_ms)) {
      vmg_complain("the agent does not answer: %s", strerror(errno));
      return false;
    }
    received = recv(connection, record, sizeof record, MSG_DONTWAIT | MSG_TRUNC);
  } while ((received < 0 && (errno == EINTR || errno == EAGAIN)) || take_trim(record, received));
  if (received <= 0) {
    vmg_complain("the agent closed the connection");
    return false;
  }
  memcpy(&ack, record, sizeof ack);
  if (received != sizeof ack || ack.magic != VMG_PRELOAD_MAGIC || ack.op != VMG_PRELOAD_OP_ACK) {
    vmg_complain("the agent's answer is invalid");
    return false;
  }
  if (ack.status != VMG_PRELOAD_STATUS_OK) vmg_complain("the agent refused");
  return ack.status == VMG_PRELOAD_STATUS_OK;
}

static int connect_agent(const char* socket_path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, socket_path, sizeof address.sun_path - 1);
  int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (connection >= 0) connection = vmg_move_high(connection);
  if (connection < 0) {
    vmg_complain("socket: %s", strerror(errno));
    return -1;
  }
  /* connect() to a full backlog blocks; this timeout limits the wait. */
  struct timeval limit = {.tv_sec = VMG_AGENT_DEADLINE_MS / 1000};
  setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  int failed;
  do failed = connect(connection, (const struct sockaddr*)&address, sizeof address);
  while (failed && errno == EINTR);
  if (failed) {
    vmg_complain("cannot reach the agent at %s: %s", socket_path, strerror(errno));
    close(connection);
    return -1;
  }
  return connection;
}

int vmg_agent_hello(const char* socket_path, const struct vmg_descriptors* descriptors) {
  int connection = connect_agent(socket_path);
  if (connection < 0) return -1;
  int64_t deadline_ms = now_ms() + VMG_AGENT_DEADLINE_MS;

  struct vmg_preload_hello hello = {.magic = VMG_PRELOAD_MAGIC,
                                    .version = VMG_PRELOAD_VERSION,
                                    .op = VMG_PRELOAD_OP_HELLO,
                                    .pid = (uint32_t)getpid(),
                                    .descriptor_count = descriptors->count};
  for (unsigned i = 0; i < descriptors->count; i++) {
    uint32_t number = (uint32_t)descriptors->fds[i];
    hello.kinds[i] = descriptors->kinds[i];
    memcpy(hello.numbers + i * sizeof number, &number, sizeof number);
  }
  size_t fd_bytes = descriptors->count * sizeof(int);
  union {
    struct cmsghdr alignment;
    char bytes[CMSG_SPACE(VMG_PRELOAD_DESCRIPTORS_MAX * sizeof(int))];
  } control;
  memset(&control, 0, sizeof control);
  struct iovec body = {.iov_base = &hello, .iov_len = sizeof hello};
  struct msghdr record = {.msg_iov = &body,
                          .msg_iovlen = 1,
                          .msg_control = control.bytes,
                          .msg_controllen = CMSG_SPACE(fd_bytes)};
  struct cmsghdr* rights = CMSG_FIRSTHDR(&record);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(fd_bytes);
  memcpy(CMSG_DATA(rights), descriptors->fds, fd_bytes);

  bool sent = send_record(connection, &record, sizeof hello, deadline_ms);
  if (!sent) vmg_complain("cannot send the hello to the agent: %s", strerror(errno));
  if (sent && receive_ack(connection, deadline_ms)) return connection;
  close(connection);
  return -1;
}

bool vmg_agent_report(int connection, const struct vmg_preload_region* region) {
  int64_t deadline_ms = now_ms() + VMG_AGENT_DEADLINE_MS;
  struct iovec body = {.iov_base = (void*)(size_t)region, .iov_len = sizeof *region};
  struct msghdr record = {.msg_iov = &body, .msg_iovlen = 1};
  if (!send_record(connection, &record, sizeof *region, deadline_ms)) {
    vmg_complain("cannot report a mapping to the agent: %s", strerror(errno));
    return false;
  }
  return receive_ack(connection, deadline_ms);
}
