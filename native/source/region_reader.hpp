#pragma once

#include <functional>

#include "base/types.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// A region that a source session serves and that is not simply the content of a file. Any thread.
class RegionReader : public transport::MemoryReader {
 public:
  /// Visits the runs of pages that may hold data, in order. The other pages are zero. Called once the content
  /// of the region is fixed.
  virtual Status each_data_run(const std::function<void(PageRun)>& visit) const = 0;
};

}  // namespace vmigrate::pager
