#pragma once

#include "base/result.hpp"

namespace vmigrate::pager {

/// Translates the errno of a call on a file of /proc/PID. If the process is gone, the file does not exist
/// (ENOENT) or is empty (ESRCH).
inline Error process_file_error(const char* what, int system_errno = errno) {
  if (system_errno == ENOENT) return {ErrorCode::kProcessGone, system_errno, what};
  return system_error(what, system_errno);
}

}  // namespace vmigrate::pager
