#pragma once

#include "transport/transport.hpp"

namespace vmigrate::pager {

/// Keys that a reader needs for one region.
struct SourceRegionKeys {
  transport::RemoteKey ram;
  transport::RemoteKey data_map;
  /// Of a region that its host still fills: one PAGE_STATE byte a page. Length 0: the source has every page.
  transport::RemoteKey presence{};
  /// Of a region whose VM still runs: the pages that it has written since the last round. Length 0: it does
  /// not run, or its writes are not tracked.
  transport::RemoteKey dirty_map{};
};

}  // namespace vmigrate::pager
