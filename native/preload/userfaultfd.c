/*
 * Userfaultfds for a process without rights. QEMU 7.2 makes those of its own post-copy by syscall(), which
 * the kernel refuses to anybody but root (vm.unprivileged_userfaultfd). Since Linux 6.1 it gives them to
 * whoever can open a device, and a contained QEMU can. QEMU asks the device itself from version 8.1 on.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/preload.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Not by the C library's syscall(), which this file takes the place of: to find that one may need memory, and
 * so a system call (hooks.c). */
static long call_kernel(long number, const long* arguments) {
  long result;
#if defined(__x86_64__)
  register long fourth __asm__("r10") = arguments[3];
  register long fifth __asm__("r8") = arguments[4];
  register long sixth __asm__("r9") = arguments[5];
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(fourth),
                     "r"(fifth), "r"(sixth)
                   : "rcx", "r11", "memory");
#elif defined(__aarch64__)
  register long call __asm__("x8") = number;
  register long first __asm__("x0") = arguments[0];
  register long second __asm__("x1") = arguments[1];
  register long third __asm__("x2") = arguments[2];
  register long fourth __asm__("x3") = arguments[3];
  register long fifth __asm__("x4") = arguments[4];
  register long sixth __asm__("x5") = arguments[5];
  __asm__ volatile("svc 0"
                   : "+r"(first)
                   : "r"(call), "r"(second), "r"(third), "r"(fourth), "r"(fifth), "r"(sixth)
                   : "memory");
  result = first;
#else
#error "the way to call the kernel is not written for this architecture"
#endif
  /* The kernel's last 4095 values are errors. */
  if (result >= 0 || result < -4095) return result;
  errno = (int)-result;
  return -1;
}

int vmg_userfaultfd(int flags) {
  const long arguments[6] = {flags};
  int fd = (int)call_kernel(SYS_userfaultfd, arguments);
  if (fd >= 0 || (errno != EPERM && errno != ENOSYS)) return fd;
  const int reason = errno;
  const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
  if (device < 0) {
    errno = reason;
    return -1;
  }
  fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
  const int saved_errno = errno;
  close(device);
  errno = saved_errno;
  return fd;
}

/* No system call has more than six arguments. A caller that gives fewer leaves the others undefined, as the
 * kernel expects. */
__attribute__((visibility("default"))) long syscall(long number, ...) {
  long arguments[6];
  va_list list;
  va_start(list, number);
  for (unsigned i = 0; i < 6; i++) arguments[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_userfaultfd) return vmg_userfaultfd((int)arguments[0]);
  return call_kernel(number, arguments);
}
