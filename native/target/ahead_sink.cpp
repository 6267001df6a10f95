#include "target/ahead_sink.hpp"

#include "base/inject_point.hpp"

namespace vmigrate::pager {

Status AheadSink::open() {
  if (core_.tags() == nullptr) return ok();
  auto writer = core_.tags()->writer();
  if (!writer) return writer.error();
  tags_ = std::move(writer).value();
  return ok();
}

void AheadSink::publish(uint32_t region_index, PageRun run) {
  inject_point(wire::InjectPoint::kTargetBeforePublish, page_key(region_index, run.first));
  FilledRegion& region = core_.region(region_index);
  if (tags_) {
    const Status noted = tags_->note(region_index, region, run);
    if (!noted) return core_.fail(noted.error());
  }
  region.presence->publish(run);
  core_.fill().add_present(run.count);
}

}  // namespace vmigrate::pager
