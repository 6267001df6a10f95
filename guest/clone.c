// Who this guest is, as the host tells it, and what becomes of that in a fork.
//
//   clone report | exit | poweroff        what to do after a fork, besides reporting it
//
// Looks at the file opt/vmigrate/clone in fw_cfg for ever. When it has changed, another VM goes on with this
// memory: the random number generator is given the new VM's guid and reseeded (kernels with a vmgenid driver
// do so by themselves; Debian 12's cloud kernel has none), the clock is set by the RTC, and NICs that come
// from now on get an address that follows from the index.
//
// Out, one line each:
//   VMG IDENTITY index=- count=- name=web fork=- generation=GUID wall_ms=1700000000000 macs=eth0=52:54:..
//   VMG FORK index=3 count=8 name=web-3 fork=ID generation=GUID before=HEX after=HEX clock_s=0 wall_ms=..
//   macs=.. VMG EXIT code=3
// Each also has host=NAME, the guest's own host name. before and after are 16 random bytes each, from before
// and after the reseeding; clock_s is by how much the clock was set. In, through the FIFO in argument 2:
// `identity` reports, `exit N` writes N to the exit port, `poweroff` ends the VM.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/rtc.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/time.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { identity_bytes = 256, poll_ms = 50, random_bytes = 16, clock_error_s_max = 2, nics_max = 8 };

static const char identity_path[] = "/sys/firmware/qemu_fw_cfg/by_name/opt/vmigrate/clone/raw";
// As far as the guid: it differs between any two VMs, and each byte is a port access of its own.
static const size_t generation_end = sizeof "{\"generation\":\"11111111-2222-3333-4444-555555555555\"" - 1;

static char identity[identity_bytes + 1];
static unsigned nic_indexes[nics_max];
static int is_forked;

static int read_identity(char* text, size_t length) {
  int fd = open(identity_path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t got = pread(fd, text, length, 0);
  close(fd);
  return got == (ssize_t)length ? 0 : -1;
}

// The value of a key in our own JSON, which has neither spaces nor escapes; "-" for null.
static const char* value_of(const char* key) {
  static char values[4][80];
  static int turn;
  char wanted[32], *value = values[turn = (turn + 1) % 4];
  snprintf(wanted, sizeof wanted, "\"%s\":", key);
  const char* at = strstr(identity, wanted);
  if (at == NULL || sscanf(at + strlen(wanted), "%*[\"]%79[^\"]", value) != 1)
    if (at == NULL || sscanf(at + strlen(wanted), "%79[0-9]", value) != 1) return "-";
  return value;
}

static long long wall_ms(void) {
  struct timespec ts;
  clock_gettime(CLOCK_REALTIME, &ts);
  return (long long)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void print_identity(void) {
  printf("index=%s count=%s ", value_of("index"), value_of("count"));
  printf("name=%s fork=%s ", value_of("name"), value_of("fork"));
  printf("generation=%s ", value_of("generation"));
}

static void print_rest(void) {
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  printf("host=%s wall_ms=%lld macs=", host, wall_ms());
  DIR* nics = opendir("/sys/class/net");
  const char* separator = "";
  for (struct dirent* entry; nics != NULL && (entry = readdir(nics)) != NULL;) {
    char path[sizeof entry->d_name + 32], mac[18] = "";
    if (strncmp(entry->d_name, "eth", 3) != 0) continue;
    snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
    FILE* file = fopen(path, "r");
    if (file != NULL && fscanf(file, "%17s", mac) == 1) {
      printf("%s%s=%s", separator, entry->d_name, mac);
      separator = ",";
    }
    if (file != NULL) fclose(file);
  }
  if (nics != NULL) closedir(nics);
  printf("\n");
  fflush(stdout);
}

static void print_random(const char* name) {
  unsigned char bytes[random_bytes];
  if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) memset(bytes, 0, sizeof bytes);
  printf("%s=", name);
  for (size_t n = 0; n < sizeof bytes; n++) printf("%02x", bytes[n]);
  printf(" ");
}

static void reseed(void) {
  int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
  const char* generation = value_of("generation");
  if (fd < 0 || write(fd, generation, strlen(generation)) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
    printf("VMG ERROR the random number generator takes no new seed: %s\n", strerror(errno));
  if (fd >= 0) close(fd);
}

// The RTC goes by the host's clock, and ticks once a second.
// Not where an agent is told the time: whoever came last would win.
static long long set_clock(void) {
  if (access("/bin/qemu-ga", X_OK) == 0) return 0;
  struct rtc_time rtc;
  int fd = open("/dev/rtc0", O_RDONLY | O_CLOEXEC);
  int got = fd < 0 ? -1 : ioctl(fd, RTC_RD_TIME, &rtc);
  if (fd >= 0) close(fd);
  if (got < 0) return 0;
  struct tm tm = {.tm_year = rtc.tm_year,
                  .tm_mon = rtc.tm_mon,
                  .tm_mday = rtc.tm_mday,
                  .tm_hour = rtc.tm_hour,
                  .tm_min = rtc.tm_min,
                  .tm_sec = rtc.tm_sec};
  struct timeval now = {.tv_sec = timegm(&tm)};
  long long error_s = (long long)now.tv_sec - (long long)time(NULL);
  if (llabs(error_s) < clock_error_s_max || settimeofday(&now, NULL) < 0) return 0;
  return error_s;
}

static void send_exit_code(int code) {
  for (int port = 1; port <= 4; port++) {
    char path[64], name[64] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/vport0p%d/name", port);
    FILE* file = fopen(path, "r");
    int got = file == NULL ? 0 : fscanf(file, "%63s", name);
    if (file != NULL) fclose(file);
    if (got != 1 || strcmp(name, "org.vmigrate.exit") != 0) continue;
    snprintf(path, sizeof path, "/dev/vport0p%d", port);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) break;
    // Before it is said, so that it is in the log of whoever waits for the code.
    printf("VMG EXIT code=%d\n", code);
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    if (dprintf(fd, "%d\n", code) < 0) break;
    close(fd);
    return;
  }
  printf("VMG ERROR no exit port: %s\n", strerror(errno));
  fflush(stdout);
}

static void power_off(void) {
  sync();
  reboot(RB_POWER_OFF);
}

static void obey(char* line) {
  if (strcmp(line, "identity") == 0) {
    printf("VMG IDENTITY ");
    print_identity();
    print_rest();
  } else if (strncmp(line, "exit ", 5) == 0) {
    send_exit_code(atoi(line + 5));
  } else if (strcmp(line, "poweroff") == 0) {
    power_off();
  }
}

// Whatever stands in the FIFO, which memtouch writes in whole lines.
static void read_commands(int fd) {
  char text[512];
  ssize_t got = read(fd, text, sizeof text - 1);
  if (got <= 0) return;
  text[got] = 0;
  for (char *rest = text, *line; (line = strsep(&rest, "\n")) != NULL;) obey(line);
}

// A NIC that has come since the fork, instead of the parent's.
static void set_up_nics(void) {
  for (unsigned n = 0; n < nics_max; n++) {
    char name[IF_NAMESIZE], command[128];
    snprintf(name, sizeof name, "eth%u", n);
    unsigned index = if_nametoindex(name);
    if (index == nic_indexes[n]) continue;
    nic_indexes[n] = index;
    if (index == 0 || !is_forked) continue;
    snprintf(command, sizeof command, "/bin/nic-up %s %s", name, value_of("index"));
    if (system(command) != 0) printf("VMG ERROR %s has no address\n", name);
    fflush(stdout);
  }
}

static void look_for_fork(const char* what_then) {
  char seen[identity_bytes];
  if (read_identity(seen, generation_end) < 0 || memcmp(seen, identity, generation_end) == 0) return;
  if (read_identity(identity, identity_bytes) < 0) return;
  is_forked = 1;
  printf("VMG FORK ");
  print_identity();
  print_random("before");
  reseed();
  print_random("after");
  printf("clock_s=%lld ", set_clock());
  print_rest();
  if (strcmp(what_then, "report") != 0) send_exit_code(atoi(value_of("index")));
  if (strcmp(what_then, "poweroff") == 0) power_off();
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: clone report|exit|poweroff FIFO\n");
    return 2;
  }
  if (read_identity(identity, identity_bytes) < 0) return 0;
  // For reading and writing: it never comes to an end.
  int commands = open(argv[2], O_RDWR | O_CLOEXEC | O_NONBLOCK);
  set_up_nics();
  char report[] = "identity";
  obey(report);
  for (;;) {
    struct pollfd input = {.fd = commands, .events = POLLIN};
    if (poll(&input, 1, poll_ms) > 0) read_commands(commands);
    look_for_fork(argv[1]);
    set_up_nics();
  }
}
