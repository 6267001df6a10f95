#pragma once

#include <functional>
#include <optional>

#include "base/types.hpp"
#include "transport/transport.hpp"

namespace vmigrate::pager {

/// A region that a source session serves and that is not simply the content of a file. Any thread.
class RegionReader : public transport::MemoryReader {
 public:
  /// Visits the runs of pages that may hold data, in order. The other pages are zero. Called once the content
  /// of the region is fixed.
  virtual Status each_data_run(const std::function<void(PageRun)>& visit) const = 0;

  /// A region that this host still fills. Readers ask for the states of pages first, so a device may serve
  /// the mapping itself. Both live as long as the reader; files and mappings show the same bytes.
  struct Partial {
    transport::LocalMemory presence;  ///< one PAGE_STATE byte a page
    transport::LocalMemory bytes;     ///< writable, as a device needs it that fills holes
  };
  virtual std::optional<Partial> partial() const { return std::nullopt; }
};

}  // namespace vmigrate::pager
