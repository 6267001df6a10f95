#include "base/result.hpp"

namespace vmigrate {

Error system_error(const char* what, int system_errno) {
  ErrorCode code = ErrorCode::kSystem;
  switch (system_errno) {
    case EPERM:
    case EACCES:
      code = ErrorCode::kNotPermitted;
      break;
    case ENOSPC:
    case EDQUOT:
      code = ErrorCode::kNoSpace;
      break;
    case ENOMEM:
      code = ErrorCode::kOutOfMemory;
      break;
    case ENOENT:
      code = ErrorCode::kNotFound;
      break;
    case EEXIST:
      code = ErrorCode::kAlreadyExists;
      break;
    case ENOSYS:
    case EOPNOTSUPP:
      code = ErrorCode::kUnsupported;
      break;
    case EPIPE:
    case ECONNRESET:
    case ECONNREFUSED:
    case ENOTCONN:
    case EHOSTUNREACH:
    case ENETUNREACH:
      code = ErrorCode::kDisconnected;
      break;
    case ETIMEDOUT:
      code = ErrorCode::kTimeout;
      break;
    case ESRCH:
      code = ErrorCode::kProcessGone;
      break;
    case EINVAL:
      code = ErrorCode::kInvalidArgument;
      break;
    default:
      break;
  }
  return Error{code, system_errno, what};
}

}  // namespace vmigrate
