// Opens a target session: opens files and presence maps, and checks that the VM's mappings cover them.

#include "target/core.hpp"
#include "vm/fit.hpp"

namespace vmigrate::pager {

Result<std::unique_ptr<TargetCore>> TargetCore::open(const VmMemory& memory,
                                                     std::span<const TargetRegionConfig> configs,
                                                     const TargetOptions& options, bool resume,
                                                     std::function<void()> on_edge) {
  std::unique_ptr<TargetCore> core(new TargetCore());
  core->vm_ = &memory;
  core->resume_ = resume;
  core->has_fetched_ahead_ = options.has_fetched_ahead;
  core->may_be_zero_ = !options.has_fetched_ahead;
  core->on_edge_ = on_edge ? std::move(on_edge) : [] {};
  if (!core->demand_wake.valid()) return system_error("eventfd");
  // Nothing is added before the fetch exists, so the last page finds it.
  auto fill = FillState::open(configs, resume, [core = core.get()] { core->fetch_->wake_lanes(); });
  if (!fill) return fill.error();
  core->fill_ = std::move(fill).value();
  if (!options.tag_paths.empty()) {
    auto tags = ArrivalTags::open(options.tag_paths, options.tag_key, *core->fill_, resume);
    if (!tags && !resume) return tags.error();
    if (tags) core->tags_ = std::move(tags).value();
  }
  core->fetch_ =
      std::make_unique<FetchCore>(*core->fill_, options, core->demand_wake, static_cast<FetchOwner&>(*core));
  if (auto status = core->fetch_->check(); !status) return status.error();
  if (auto status = check_vm_fits(memory, geometry_of(*core->fill_)); !status) return status.error();
  core->ranges_.resize(core->fill_->regions().size());
  for (const MappedRange& range : memory.ranges) core->ranges_[range.region_index].push_back(range);
  return core;
}

}  // namespace vmigrate::pager
