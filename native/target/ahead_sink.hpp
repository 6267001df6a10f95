#pragma once

#include <memory>

#include "fetch/page_sink.hpp"
#include "target/core.hpp"

namespace vmigrate::pager {

/// What happens to pages that are fetched while the VM still runs on the source: their tags and states, and
/// nothing that its mappings here would show. A page that is mapped could not be taken back.
class AheadSink final : public PageSink {
 public:
  explicit AheadSink(TargetCore& core) : core_(core) {}
  /// Call it before the first publish.
  Status open();

  void publish(uint32_t region_index, PageRun run) override;
  bool is_awaited(uint32_t, PageRun) const override { return false; }
  bool has_room(size_t) const override { return true; }
  bool has_deferred() const override { return false; }
  bool retry() override { return false; }

 private:
  TargetCore& core_;
  std::unique_ptr<ArrivalTags::Writer> tags_;
};

}  // namespace vmigrate::pager
