#pragma once

#include "base/result.hpp"

namespace vmigrate::pager {

/// What the errno of a call on a file of /proc/PID means: without its process the file is not there (ENOENT),
/// or holds nothing any more (ESRCH).
inline Error process_file_error(const char* what, int system_errno = errno) {
  if (system_errno == ENOENT) return {ErrorCode::kProcessGone, system_errno, what};
  return system_error(what, system_errno);
}

}  // namespace vmigrate::pager
