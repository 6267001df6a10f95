#pragma once

#include "base/result.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {

/// What an ioctl on a VM's memory that could not be done means for whoever serves that VM.
inline Error uffd_error(const uffd::RangeOutcome& result, const char* what) {
  switch (result.outcome) {
    case uffd::Outcome::kGone:
      return {ErrorCode::kProcessGone, result.system_errno, what};
    case uffd::Outcome::kNoPage:
      return {ErrorCode::kRegionChanged, result.system_errno, what};
    case uffd::Outcome::kNoMemory:
      return {ErrorCode::kOutOfMemory, result.system_errno, what};
    default:
      return system_error(what, result.system_errno);
  }
}

}  // namespace vmigrate::pager
