#pragma once

#include "transport/transport.hpp"

namespace vmigrate::pager {

/// Keys that the target needs for one region; the source exposes both.
struct SourceRegionKeys {
  transport::RemoteKey ram;
  transport::RemoteKey data_map;
};

}  // namespace vmigrate::pager
