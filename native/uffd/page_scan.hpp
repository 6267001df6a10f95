#pragma once

#include <cstdint>
#include <functional>

#include "base/result.hpp"
#include "base/types.hpp"

namespace vmigrate::uffd {

// What the kernel knows of the write-protection of another process's pages: PAGEMAP_SCAN (Linux 6.7), on a
// descriptor of /proc/PID/pagemap. The range must be registered with a userfaultfd of UFFD_FEATURE_WP_ASYNC,
// by which the kernel itself takes the protection of a page away when it is written.

/// Bytes of the process's address space, whole pages of the kernel.
struct Stretch {
  HostAddr base;
  uint64_t length_bytes;
};
using VisitStretch = std::function<void(const Stretch&)>;

/// Visits the mapped pages that are not protected, in order, and protects each of them in the same moment.
/// kProcessGone if the process has ended, kUnsupported if the range is not registered as above.
Status protect_written(int pagemap, const Stretch& range, const VisitStretch& visit);
/// Visits the pages whose protection is in place: nobody has written to them since they were protected. Of
/// the others nothing is known. One of them may be mapped nowhere, because the kernel has taken it away.
Status each_protected(int pagemap, const Stretch& range, const VisitStretch& visit);

/// Whether this kernel has the call.
bool has_page_scan();

}  // namespace vmigrate::uffd
