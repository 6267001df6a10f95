/*
 * Where QEMU runs, and as whom: a root that shows what it needs, a user of its own, and no capabilities. Each
 * step takes rights away that a later one does not need.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "launcher/launcher.h"

enum { DIRECTORY_MODE = 0755, FILE_MODE = 0644, CAPABILITY_MAX = 63 };

/* The tap lasts as long as its network namespace, and the program attaches to it as its owner. */
static bool make_tap(const char* name, uid_t owner) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  if (strlen(name) >= IFNAMSIZ) {
    errno = ENAMETOOLONG;
    return vmg_complain_of("cannot make the tap", name);
  }
  strcpy(request.ifr_name, name);
  request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  const int tun = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
  const bool is_made = tun >= 0 && ioctl(tun, TUNSETIFF, &request) == 0 &&
                       ioctl(tun, TUNSETOWNER, (unsigned long)owner) == 0 &&
                       ioctl(tun, TUNSETPERSIST, 1UL) == 0;
  const bool is_good = is_made || vmg_complain_of("cannot make the tap", name);
  if (tun >= 0) close(tun);
  return is_good;
}

/* Makes the directories above `path`, which lies below the new root. */
static bool make_parents(char* path, size_t root_length) {
  for (char* slash = strchr(path + root_length + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
    *slash = '\0';
    const bool is_there = mkdir(path, DIRECTORY_MODE) == 0 || errno == EEXIST;
    *slash = '/';
    if (!is_there) return false;
  }
  return true;
}

static bool copy_link(const char* from, const char* to) {
  char text[PATH_MAX];
  const ssize_t length = readlink(from, text, sizeof text - 1);
  if (length < 0) return false;
  text[length] = '\0';
  return symlink(text, to) == 0 || errno == EEXIST;
}

/* Shows a directory, a file or a link of the host at the same path below the new root. What this host does
 * not have is left out. */
static bool show(const char* root, const struct vmg_mount* mount_of) {
  char target[VMG_PATH_BYTES_MAX];
  struct stat shown;
  if (lstat(mount_of->path, &shown) != 0) return errno == ENOENT;
  const int length = snprintf(target, sizeof target, "%s%s", root, mount_of->path);
  if (length < 0 || (size_t)length >= sizeof target) {
    errno = ENAMETOOLONG;
    return false;
  }
  if (!make_parents(target, strlen(root))) return false;
  /* An earlier mount shows it, or a link leads there: then this would be the host's own file. */
  if (!S_ISDIR(shown.st_mode) && access(target, F_OK) == 0) return true;
  if (S_ISLNK(shown.st_mode)) return copy_link(mount_of->path, target);
  if (S_ISDIR(shown.st_mode)) {
    if (mkdir(target, DIRECTORY_MODE) != 0 && errno != EEXIST) return false;
  } else {
    const int file = open(target, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, FILE_MODE);
    if (file < 0) return false;
    close(file);
  }
  unsigned long flags = MS_REMOUNT | MS_BIND | MS_NOSUID;
  if (mount_of->kind == VMG_MOUNT_READ_ONLY) flags |= MS_RDONLY | MS_NODEV;
  if (mount_of->kind == VMG_MOUNT_WRITABLE) flags |= MS_NODEV | MS_NOEXEC;
  if (mount_of->kind == VMG_MOUNT_DEVICE) flags |= MS_NOEXEC;
  return mount(mount_of->path, target, NULL, MS_BIND | MS_REC, NULL) == 0 &&
         mount(NULL, target, NULL, flags, NULL) == 0;
}

/* /proc shows the processes of this user only. */
static bool show_processes(const char* root) {
  char path[VMG_PATH_BYTES_MAX];
  snprintf(path, sizeof path, "%s/proc", root);
  return mkdir(path, DIRECTORY_MODE) == 0 &&
         mount("proc", path, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=2") == 0;
}

/* The new root covers the old one, which then goes: no path leads there any more. A host that runs from its
 * initramfs cannot give that up: there it stays below, where a process without rights does not get. */
static bool change_root(const char* root) {
  if (chdir(root) != 0) return false;
  if (syscall(SYS_pivot_root, ".", ".") == 0) return umount2(".", MNT_DETACH) == 0 && chdir("/") == 0;
  return errno == EINVAL && mount(".", "/", NULL, MS_MOVE, NULL) == 0 && chroot(".") == 0 && chdir("/") == 0;
}

static bool enter_root(const struct vmg_container* container) {
  const char* root = container->root;
  /* What is mounted from here on is seen in this namespace alone. */
  if (unshare(CLONE_NEWNS | CLONE_NEWIPC) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
    return vmg_complain_of("no mount namespace for", root);
  if (mount("vmigrate-root", root, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k") != 0)
    return vmg_complain_of("no private root on", root);
  for (unsigned i = 0; i < container->mount_count; i++)
    if (!show(root, &container->mounts[i]))
      return vmg_complain_of("cannot show in the private root:", container->mounts[i].path);
  if (!show_processes(root)) return vmg_complain_of("cannot show in the private root:", "/proc");
  if (!change_root(root) || mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, NULL) != 0)
    return vmg_complain_of("cannot enter the private root", root);
  return true;
}

static bool become_user(uid_t uid) {
  /* What root has in its keyring is not for QEMU. A kernel without keyrings has nothing there. */
  (void)syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);
  for (int capability = 0; capability <= CAPABILITY_MAX; capability++)
    if (prctl(PR_CAPBSET_DROP, capability) != 0 && errno != EINVAL) return false;
  return setgroups(0, NULL) == 0 && setresgid(uid, uid, uid) == 0 && setresuid(uid, uid, uid) == 0 &&
         prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

bool vmg_enter_container(const struct vmg_container* container) {
  for (unsigned i = 0; i < container->tap_count; i++)
    if (!make_tap(container->taps[i], container->uid)) return false;
  if (container->root != NULL && !enter_root(container)) return false;
  if (become_user(container->uid)) return true;
  vmg_complain("cannot become the user of the VM");
  return false;
}
