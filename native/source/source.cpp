#include "source/source.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"
#include "base/thread_util.hpp"
#include "memory/region.hpp"
#include "source/clone_region.hpp"
#include "source/data_map.hpp"

namespace vmigrate::pager {
namespace {

class ExposedSource final : public SourceSession {
 public:
  static Result<std::unique_ptr<SourceSession>> open(transport::Listener& listener,
                                                     const transport::Credentials& credentials,
                                                     std::span<const SourceRegionConfig> configs,
                                                     const SourceCloneConfig* clone, const VmMemory* tracked);
  ~ExposedSource() override;

  std::span<const SourceRegionKeys> keys() const override { return keys_; }
  Status scan() override;
  Result<DirtyMaps::Round> note_dirty(bool is_last) override;
  Result<bool> has_changed_since_last() override;
  Result<std::vector<std::byte>> digest_chunks(const memory::ChunkRequest& request) const override;
  void counters(std::span<uint64_t, wire::kSourceCounterCount> out) const override;
  std::optional<Error> failure() const override;

 private:
  explicit ExposedSource(transport::Listener& listener) : listener_(listener) {}
  struct SourceRegion {
    std::unique_ptr<memory::Region> region;
    std::unique_ptr<DataMap> map;
    /// Pages that were holes before `expose` filled them; empty if the provider does not fill holes. The VM
    /// may have written to them since, so the scan reads these pages when the VM has stopped.
    std::vector<bool> filled_holes;
    std::unique_ptr<CloneRegion> clone;  ///< nullptr: the file holds the whole region, or `reader` shows it
    const RegionReader* reader = nullptr;
  };

  Status open_process(const SourceCloneConfig& clone);
  Status add_region(const SourceRegionConfig& config, const SourceCloneConfig* clone);
  Status add_dirty_map(uint32_t region_index);
  Status note_holes(SourceRegion& source) const;
  void scan_all();
  bool scanned(const Status& status);
  Status scan_region(uint32_t region_index);
  Status each_used_run(const SourceRegion& source, const std::function<void(PageRun)>& visit) const;

  transport::Listener& listener_;
  std::unique_ptr<ProcessMemory> process_;  ///< of a clone whose process runs
  std::vector<SourceRegion> regions_;
  std::unique_ptr<DirtyMaps> dirty_;  ///< nullptr: writes are not tracked
  std::mutex dirty_mutex_;            // guards dirty_ from open on
  std::vector<SourceRegionKeys> keys_;
  // Declared after the regions, so it is destroyed first and no provider thread touches unmapped memory.
  std::unique_ptr<transport::ExposedSession> exposed_;

  mutable std::mutex mutex_;  // guards scan_begun_, failure_, scan_thread_
  bool scan_begun_ = false;
  std::optional<Error> failure_;
  std::thread scan_thread_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> data_pages_{0};
  std::atomic<uint64_t> zero_pages_{0};
  std::atomic<uint64_t> scan_cpu_ns_{0};
};

Result<std::unique_ptr<SourceSession>> ExposedSource::open(transport::Listener& listener,
                                                           const transport::Credentials& credentials,
                                                           std::span<const SourceRegionConfig> configs,
                                                           const SourceCloneConfig* clone,
                                                           const VmMemory* tracked) {
  if (configs.empty() || configs.size() > wire::kPreloadRegionsMax ||
      (clone != nullptr && clone->own_paths.size() != configs.size())) {
    return Error{ErrorCode::kInvalidArgument, 0, "number of regions"};
  }
  std::unique_ptr<ExposedSource> session(new ExposedSource(listener));
  if (clone != nullptr) {
    if (auto status = session->open_process(*clone); !status) return status.error();
  }
  if (tracked != nullptr) {
    // Before anything of the memory is looked at: what is written after that look must be known.
    auto dirty = DirtyMaps::start(*tracked);
    if (!dirty) return dirty.error();
    session->dirty_ = std::move(dirty).value();
  }
  auto exposed = listener.expose_session(
      credentials, [](void*, transport::Channel, std::span<const std::byte>) {}, nullptr);
  if (!exposed) return exposed.error();
  session->exposed_ = std::move(exposed).value();
  for (const SourceRegionConfig& config : configs) {
    if (auto status = session->add_region(config, clone); !status) return status.error();
  }
  if (tracked != nullptr) {
    if (auto status = session->scan(); !status) return status.error();
  }
  return std::unique_ptr<SourceSession>(std::move(session));
}

/// If the process has exited, use the pages saved earlier.
Status ExposedSource::open_process(const SourceCloneConfig& clone) {
  if (clone.memory == nullptr) return ok();
  auto process = ProcessMemory::open(*clone.memory);
  if (process)
    process_ = std::move(process).value();
  else if (!clone.resume)
    return process.error();
  return ok();
}

Status ExposedSource::add_region(const SourceRegionConfig& config, const SourceCloneConfig* clone) {
  // A device cannot read memory that is in two places, or that comes when asked. It can read a region that is
  // still filled, whose readers look at the states first.
  const auto partial = config.reader != nullptr ? config.reader->partial() : std::nullopt;
  const bool fills_holes = clone == nullptr && config.reader == nullptr && listener_.fills_holes();
  auto region = memory::Region::open(config.path, config.length_bytes, config.page_bytes,
                                     fills_holes ? memory::Mode::kReadWrite : memory::Mode::kReadOnly);
  if (!region) return region.error();
  auto map = DataMap::create(region.value()->page_count());
  if (!map) return map.error();
  SourceRegion& added = regions_.emplace_back(
      SourceRegion{std::move(region).value(), std::move(map).value(), {}, nullptr, config.reader});
  const auto region_index = static_cast<uint32_t>(regions_.size() - 1);
  if (clone != nullptr) {
    auto opened = CloneRegion::open(*added.region, region_index, process_.get(),
                                    clone->own_paths[region_index], clone->resume);
    if (!opened) return opened.error();
    added.clone = std::move(opened).value();
  }
  if (fills_holes) {
    if (auto status = note_holes(added); !status) return status;
  }
  transport::LocalMemory memory{.length_bytes = added.region->length_bytes()};
  if (added.clone) {
    memory.reader = added.clone.get();
  } else if (partial && listener_.fills_holes()) {
    memory = partial->bytes;
  } else if (added.reader != nullptr) {
    memory.reader = added.reader;
  } else {
    memory.base = added.region->base();
    memory.fd = added.region->fd();
  }
  auto ram = exposed_->expose(memory, transport::Access::kRead);
  if (!ram) return ram.error();
  auto data_map = exposed_->expose(listener_.fills_holes() ? added.map->pinnable() : added.map->readable(),
                                   transport::Access::kRead);
  if (!data_map) return data_map.error();
  keys_.push_back({ram.value(), data_map.value()});
  if (dirty_) {
    if (auto status = add_dirty_map(region_index); !status) return status;
  }
  if (!partial) return ok();
  auto presence = exposed_->expose(partial->presence, transport::Access::kRead);
  if (!presence) return presence.error();
  keys_.back().presence = presence.value();
  return ok();
}

Status ExposedSource::add_dirty_map(uint32_t region_index) {
  if (auto status = dirty_->add(*regions_[region_index].region); !status) return status;
  const DataMap& map = dirty_->map(region_index);
  auto key =
      exposed_->expose(listener_.fills_holes() ? map.pinnable() : map.readable(), transport::Access::kRead);
  if (!key) return key.error();
  keys_.back().dirty_map = key.value();
  return ok();
}

Result<DirtyMaps::Round> ExposedSource::note_dirty(bool is_last) {
  const std::lock_guard lock(dirty_mutex_);
  if (!dirty_) return Error{ErrorCode::kInvalidArgument, 0, "writes are not tracked"};
  return dirty_->note(is_last);
}

Result<bool> ExposedSource::has_changed_since_last() {
  const std::lock_guard lock(dirty_mutex_);
  if (!dirty_) return Error{ErrorCode::kInvalidArgument, 0, "writes are not tracked"};
  return dirty_->has_changed_since_last();
}

/// The VM still runs. A page that it writes meanwhile may be recorded here as a hole, never the reverse.
Status ExposedSource::note_holes(SourceRegion& source) const {
  source.filled_holes.assign(source.region->page_count(), true);
  return source.region->each_data_run([&](PageRun run) {
    const auto first = source.filled_holes.begin() + static_cast<ptrdiff_t>(raw(run.first));
    std::fill_n(first, run.count, false);
  });
}

ExposedSource::~ExposedSource() {
  // Relaxed: it only asks the scan to hurry; join orders the rest.
  stop_.store(true, std::memory_order_relaxed);
  exposed_.reset();
  if (scan_thread_.joinable()) scan_thread_.join();
}

Status ExposedSource::scan() {
  const std::lock_guard lock(mutex_);
  if (scan_begun_) return ok();
  scan_begun_ = true;
  const SignalsBlocked blocked;
  scan_thread_ = std::thread([this] { scan_all(); });
  return ok();
}

void ExposedSource::scan_all() {
  set_up_thread("vmg-scan", 0);
  bool goes_on = true;
  for (uint32_t i = 0; i < regions_.size() && goes_on; ++i) goes_on = scanned(scan_region(i));
  // The clones' pages are kept only now, because the target waits for the maps.
  for (uint32_t i = 0; i < regions_.size() && goes_on; ++i)
    if (regions_[i].clone) goes_on = scanned(regions_[i].clone->keep(stop_));
  scan_cpu_ns_.store(thread_cpu_ns(), std::memory_order_relaxed);
}

/// Returns whether there is a next region to scan.
bool ExposedSource::scanned(const Status& status) {
  if (!status) {
    const std::lock_guard lock(mutex_);
    failure_ = status.error();
  }
  return status.ok() && !stop_.load(std::memory_order_relaxed);
}

Status ExposedSource::scan_region(uint32_t region_index) {
  SourceRegion& source = regions_[region_index];
  inject_point(wire::InjectPoint::kSourceScan, page_key(region_index, PageIndex{0}));
  if (source.clone) {
    if (auto status = source.clone->look(); !status) return status;
  }
  uint64_t data_pages = 0;
  const Status walked = each_used_run(source, [&](PageRun run) {
    if (stop_.load(std::memory_order_relaxed)) return;
    source.map->set(run);
    data_pages += run.count;
  });
  if (!walked) return walked;
  if (stop_.load(std::memory_order_relaxed)) return ok();
  // Counted before the map is announced: when a target has read the map, its owner may ask for the counters.
  data_pages_.fetch_add(data_pages, std::memory_order_relaxed);
  zero_pages_.fetch_add(source.region->page_count() - data_pages, std::memory_order_relaxed);
  source.map->finish(data_pages);
  return ok();
}

/// Visits the runs with data: the data runs of the file, and of the holes that exposing has filled only the
/// pages that the VM has written to.
Status ExposedSource::each_used_run(const SourceRegion& source,
                                    const std::function<void(PageRun)>& visit) const {
  if (source.clone) return source.clone->each_used_run(visit);
  if (source.reader != nullptr) return source.reader->each_data_run(visit);
  if (source.filled_holes.empty()) return source.region->each_data_run(visit);
  Status looked = ok();
  const Status walked = source.region->each_data_run([&](PageRun run) {
    const auto begin = source.filled_holes.begin() + static_cast<ptrdiff_t>(raw(run.first));
    const auto end = begin + static_cast<ptrdiff_t>(run.count);
    for (auto at = begin; at != end && looked.ok() && !stop_.load(std::memory_order_relaxed);) {
      const auto next = std::find(at, end, !*at);
      const PageRun part{PageIndex{static_cast<uint64_t>(at - source.filled_holes.begin())},
                         static_cast<uint64_t>(next - at)};
      if (*at)
        looked = source.region->each_nonzero_run(part, visit);
      else
        visit(part);
      at = next;
    }
  });
  return walked.ok() ? looked : walked;
}

Result<std::vector<std::byte>> ExposedSource::digest_chunks(const memory::ChunkRequest& request) const {
  if (request.region_index >= regions_.size()) return Error{ErrorCode::kInvalidArgument, 0, "region"};
  const SourceRegion& source = regions_[request.region_index];
  const memory::Region& file = *source.region;
  const transport::MemoryReader* reader = source.reader;
  if (source.clone) reader = source.clone.get();
  const auto read = [&](uint64_t offset_bytes, std::span<std::byte> out) {
    return reader != nullptr ? reader->read(offset_bytes, out) : file.read(offset_bytes, out);
  };
  const auto tag = [&](memory::PageTagger& tagger, PageRun run, std::span<std::byte> tags) -> Status {
    // A clone's own pages are not in the file.
    const auto may_hold = reader != nullptr ? Result<bool>(true) : file.may_hold_data(run);
    if (!may_hold) return may_hold.error();
    if (may_hold.value()) return tagger.tag(request.region_index, file.page_bytes(), run, read, tags);
    std::fill(tags.begin(), tags.end(), std::byte{0});
    return ok();
  };
  return memory::digest_chunks(request, file.page_count(), file.page_bytes(), tag);
}

void ExposedSource::counters(std::span<uint64_t, wire::kSourceCounterCount> out) const {
  using wire::SourceCounter;
  const auto set = [&](SourceCounter counter, uint64_t value) { out[static_cast<size_t>(counter)] = value; };
  const transport::ExposedSessionCounters served = exposed_->counters();
  set(SourceCounter::kReadCount, served.read_count);
  set(SourceCounter::kReadBytes, served.read_bytes);
  set(SourceCounter::kDataPages, data_pages_.load(std::memory_order_relaxed));
  set(SourceCounter::kZeroPages, zero_pages_.load(std::memory_order_relaxed));
  set(SourceCounter::kConnections, served.connections);
  set(SourceCounter::kRejectedHellos, listener_.rejected_hellos());
  set(SourceCounter::kCpuNs, served.cpu_ns + scan_cpu_ns_.load(std::memory_order_relaxed));
  uint64_t own_pages = 0, kept_pages = 0;
  for (const SourceRegion& source : regions_) {
    own_pages += source.clone ? source.clone->own_pages() : 0;
    kept_pages += source.clone ? source.clone->kept_pages() : 0;
  }
  set(SourceCounter::kOwnPages, own_pages);
  set(SourceCounter::kOwnPagesKept, kept_pages);
}

std::optional<Error> ExposedSource::failure() const {
  for (const SourceRegion& source : regions_)
    if (source.clone && source.clone->lost())
      return Error{ErrorCode::kProcessGone, 0, "a clone exited before its own pages were saved"};
  const std::lock_guard lock(mutex_);
  return failure_;
}

}  // namespace

Result<std::unique_ptr<SourceSession>> SourceSession::open(transport::Listener& listener,
                                                           const transport::Credentials& credentials,
                                                           std::span<const SourceRegionConfig> regions,
                                                           const SourceCloneConfig* clone,
                                                           const VmMemory* tracked) {
  return ExposedSource::open(listener, credentials, regions, clone, tracked);
}

}  // namespace vmigrate::pager
