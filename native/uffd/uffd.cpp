#include "uffd/uffd.hpp"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>

#include "base/check.hpp"

namespace vmigrate::uffd {
namespace {

static_assert(static_cast<uint64_t>(Mode::kMissing) == UFFDIO_REGISTER_MODE_MISSING);
static_assert(static_cast<uint64_t>(Mode::kWriteProtect) == UFFDIO_REGISTER_MODE_WP);
static_assert(static_cast<uint64_t>(Mode::kMinor) == UFFDIO_REGISTER_MODE_MINOR);

constexpr size_t kEventsMax = 64;

Outcome outcome_of(int system_errno) {
  switch (system_errno) {
    case EEXIST:
      return Outcome::kExists;
    case EAGAIN:
      return Outcome::kAgain;
    case ESRCH:
    case ENOENT:
      return Outcome::kGone;
    case EFAULT:
      return Outcome::kNoPage;
    case ENOMEM:
    case ENOSPC:
      return Outcome::kNoMemory;
    default:
      return Outcome::kInvalid;
  }
}

/// Uses a call that changes nothing: there is no range below the lowest address that a process may map.
bool is_process_gone(int uffd) {
  constexpr uint64_t kNeverMapped = 1 << 16;
  uffdio_writeprotect argument{};
  argument.range = {kNeverMapped, wire::kPageBytesMin};
  return ::ioctl(uffd, UFFDIO_WRITEPROTECT, &argument) != 0 && errno == ESRCH;
}

/// REGISTER and UNREGISTER return ENOMEM where every other call returns ESRCH.
RangeOutcome told_apart(int uffd, const RangeOutcome& result) {
  if (result.system_errno != ENOMEM || !is_process_gone(uffd)) return result;
  return {Outcome::kGone, result.done_bytes, ESRCH};
}

/// An ioctl without a result field does all or nothing.
template <typename Argument>
RangeOutcome whole(int uffd, unsigned long request, Argument& argument, uint64_t length_bytes) {
  int rc;
  do {
    rc = ::ioctl(uffd, request, &argument);
  } while (rc != 0 && errno == EINTR);
  if (rc == 0) return {Outcome::kDone, length_bytes, 0};
  return {outcome_of(errno), 0, errno};
}

/// An ioctl that fills page by page and stops at the first page that it cannot do. If a part was done, the
/// kernel returns EAGAIN and writes the part's length to the result field; only a second call from there
/// shows the reason. The field is negative or untouched when nothing was done.
template <typename Argument>
RangeOutcome by_parts(int uffd, unsigned long request, HostAddr base, uint64_t length_bytes,
                      __s64 Argument::*result_bytes) {
  uint64_t done_bytes = 0;
  while (done_bytes < length_bytes) {
    Argument argument{};
    argument.range.start = raw(base) + done_bytes;
    argument.range.len = length_bytes - done_bytes;
    if (::ioctl(uffd, request, &argument) == 0) return {Outcome::kDone, length_bytes, 0};
    const int system_errno = errno;
    if (system_errno == EINTR) continue;
    const __s64 part_bytes = argument.*result_bytes;
    if (system_errno == EAGAIN && part_bytes > 0) {
      done_bytes += static_cast<uint64_t>(part_bytes);
      continue;
    }
    return {outcome_of(system_errno), done_bytes, system_errno};
  }
  return {Outcome::kDone, length_bytes, 0};
}

}  // namespace

Error call_error(int system_errno, const char* what) {
  switch (system_errno) {
    case ENOENT:  // the range is not mapped any more
      return {ErrorCode::kProcessGone, system_errno, what};
    case EFAULT:  // the file has no page there
      return {ErrorCode::kRegionChanged, system_errno, what};
    case ENOSPC:
      return {ErrorCode::kOutOfMemory, system_errno, what};
    default:
      return system_error(what, system_errno);
  }
}

RangeOutcome register_range(int uffd, HostAddr base, uint64_t length_bytes, uint64_t modes) {
  uffdio_register argument{};
  argument.range = {raw(base), length_bytes};
  argument.mode = modes;
  return told_apart(uffd, whole(uffd, UFFDIO_REGISTER, argument, length_bytes));
}

RangeOutcome unregister_range(int uffd, HostAddr base, uint64_t length_bytes) {
  uffdio_range argument{raw(base), length_bytes};
  return told_apart(uffd, whole(uffd, UFFDIO_UNREGISTER, argument, length_bytes));
}

RangeOutcome continue_range(int uffd, HostAddr base, uint64_t length_bytes) {
  return by_parts<uffdio_continue>(uffd, UFFDIO_CONTINUE, base, length_bytes, &uffdio_continue::mapped);
}

RangeOutcome zero_range(int uffd, HostAddr base, uint64_t length_bytes) {
  return by_parts<uffdio_zeropage>(uffd, UFFDIO_ZEROPAGE, base, length_bytes, &uffdio_zeropage::zeropage);
}

RangeOutcome wake_range(int uffd, HostAddr base, uint64_t length_bytes) {
  uffdio_range argument{raw(base), length_bytes};
  return whole(uffd, UFFDIO_WAKE, argument, length_bytes);
}

RangeOutcome write_protect_range(int uffd, HostAddr base, uint64_t length_bytes, bool protect) {
  uffdio_writeprotect argument{};
  argument.range = {raw(base), length_bytes};
  argument.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
  return whole(uffd, UFFDIO_WRITEPROTECT, argument, length_bytes);
}

ReadOutcome read_faults(int uffd, std::span<FaultEvent> out) {
  VMG_CHECK(!out.empty() && out.size() <= kEventsMax);
  std::array<uffd_msg, kEventsMax> events;
  ssize_t bytes;
  do {
    bytes = ::read(uffd, events.data(), out.size() * sizeof(uffd_msg));
  } while (bytes < 0 && errno == EINTR);
  if (bytes < 0 && errno == EAGAIN) return {Outcome::kDone};
  if (bytes < 0) return {outcome_of(errno), 0, errno};
  size_t count = 0;
  for (size_t i = 0; i < static_cast<size_t>(bytes) / sizeof(uffd_msg); ++i) {
    const uffd_msg& event = events[i];
    if (event.event != UFFD_EVENT_PAGEFAULT) continue;
    const __u64 flags = event.arg.pagefault.flags;
    out[count++] = FaultEvent{
        .address = HostAddr{event.arg.pagefault.address},
        .is_minor = (flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0,
        .is_write = (flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0,
        .is_write_protect = (flags & UFFD_PAGEFAULT_FLAG_WP) != 0,
        .thread_id = event.arg.pagefault.feat.ptid,
    };
  }
  return {Outcome::kDone, count};
}

}  // namespace vmigrate::uffd
