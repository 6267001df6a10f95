#pragma once

#include <cstdint>
#include <span>

#include "base/result.hpp"
#include "base/types.hpp"

namespace vmigrate::uffd {

// Thin, typed userfaultfd calls. They turn errno into an outcome and leave policy to the caller. EINTR is
// retried here. All take the descriptor as an int because its owner (pager::VmMemory) shares it between
// threads.

enum class Outcome : uint8_t {
  kDone = 1,
  /// A page is mapped there already. Its waiters may not have been woken, so the caller must wake them.
  kExists,
  /// The address space is changing (EAGAIN). Read events, then retry from `done_bytes`.
  kAgain,
  /// The process or the mapping is gone (ESRCH, ENOENT).
  kGone,
  /// The page cache has no page to map (EFAULT): a hole, or the file shrank.
  kNoPage,
  /// Out of memory, or the file system is full.
  kNoMemory,
  /// An invalid argument, which is a bug of ours.
  kInvalid,
};

/// `done_bytes`: how much of the range was handled before the outcome. It comes from the kernel's result
/// field, not only from the return code.
struct RangeOutcome {
  Outcome outcome;
  uint64_t done_bytes = 0;
  int system_errno = 0;
};

enum class Mode : uint64_t { kMissing = 1, kWriteProtect = 2, kMinor = 4 };

struct FaultEvent {
  HostAddr address;
  bool is_minor = false;
  bool is_write = false;
  bool is_write_protect = false;
  uint32_t thread_id = 0;
};

struct ReadOutcome {
  Outcome outcome;   ///< kDone with count 0: no fault was waiting
  size_t count = 0;  ///< faults written to `out`; other events are left out
  int system_errno = 0;
};

/// Translates the errno of a call here for the code that serves the VM. `what` names the call: "UFFDIO_WAKE".
Error call_error(int system_errno, const char* what);

/// Both calls distinguish a process that is gone from a lack of memory (the kernel reports either as ENOMEM).
RangeOutcome register_range(int uffd, HostAddr base, uint64_t length_bytes, uint64_t modes);
RangeOutcome unregister_range(int uffd, HostAddr base, uint64_t length_bytes);
/// Maps pages that are in the file's page cache and wakes the threads that wait for them.
RangeOutcome continue_range(int uffd, HostAddr base, uint64_t length_bytes);
/// Maps fresh zero pages. Not for hugetlbfs.
RangeOutcome zero_range(int uffd, HostAddr base, uint64_t length_bytes);
RangeOutcome wake_range(int uffd, HostAddr base, uint64_t length_bytes);
RangeOutcome write_protect_range(int uffd, HostAddr base, uint64_t length_bytes, bool protect);
/// Non-blocking read of up to out.size() (at most 64) page faults.
ReadOutcome read_faults(int uffd, std::span<FaultEvent> out);

/// Features that this kernel offers to this process; for `vmctl doctor` and pre-flight.
struct Support {
  bool permitted = false;
  bool minor_shmem = false;
  bool minor_hugetlbfs = false;
  bool wp_async = false;
  bool pagemap_scan = false;
  int system_errno = 0;
};
Support probe();

}  // namespace vmigrate::uffd
