#include "image/parent/memory.hpp"

#include <sched.h>

#include <algorithm>

#include "vm/fit.hpp"
#include "vm/mapping.hpp"

namespace vmigrate::pager {

Status ParentMemory::check(std::span<const RegionFileConfig> source,
                           std::span<const TargetRegionConfig> image) {
  if (source.size() != image.size())
    return Error{ErrorCode::kInvalidArgument, 0, "regions of image and source"};
  for (size_t i = 0; i < source.size(); ++i) {
    if (image[i].length_bytes != source[i].length_bytes || image[i].page_bytes != source[i].page_bytes) {
      return Error{ErrorCode::kInvalidArgument, 0, "image region has another length or page size"};
    }
  }
  return check_regions(source);
}

Result<std::unique_ptr<ParentMemory>> ParentMemory::open(ImageCore& core, const VmMemory* parent,
                                                         std::span<const RegionFileConfig> source) {
  std::unique_ptr<ParentMemory> memory(new ParentMemory(core, parent));
  for (const RegionFileConfig& region : source) {
    if (auto status = memory->open_region(region); !status) return status.error();
  }
  if (parent != nullptr) {
    if (auto status = check_vm_fits(*parent, core.geometry()); !status) return status.error();
  }
  if (std::any_of(memory->regions_.begin(), memory->regions_.end(),
                  [](const ParentRegion& region) { return region.is_in_process; })) {
    auto process = ProcessMemory::open(*parent);
    if (!process) return process.error();
    memory->process_ = std::move(process).value();
  }
  return memory;
}

Status ParentMemory::open_region(const RegionFileConfig& source) {
  const FilledRegion& image = core_.region(static_cast<uint32_t>(regions_.size()));
  auto file =
      memory::Region::open(source.path, source.length_bytes, source.page_bytes, memory::Mode::kReadOnly);
  if (!file) return file.error();
  if (source.is_private && (vm_ == nullptr || image.hugetlbfs)) {
    return Error{ErrorCode::kUnsupported, 0, "image of copy-on-write memory: no process, or on hugetlbfs"};
  }
  regions_.push_back({std::move(file).value(), source.is_private, {}});
  return ok();
}

Status ParentMemory::each_data_page(uint32_t region_index, const std::function<void(uint64_t)>& visit) const {
  const ParentRegion& region = regions_[region_index];
  const auto visit_all = [&](uint64_t first, uint64_t end) {
    for (uint64_t page = first; page < end; ++page) visit(page);
  };
  auto status =
      region.file->each_data_run([&](PageRun run) { visit_all(raw(run.first), raw(run.first) + run.count); });
  if (!status || !region.is_in_process) return status;
  const uint64_t kernel_pages = region.file->page_bytes() / wire::kPageBytesMin;
  status = process_->each_own_run(region_index, 0, region.file->length_bytes(), [&](PageRun run) {
    visit_all(raw(run.first) / kernel_pages, (raw(run.first) + run.count + kernel_pages - 1) / kernel_pages);
  });
  return status ? process_->whole() : status;
}

Status ParentMemory::look_for_data() {
  for (uint32_t i = 0; i < regions_.size(); ++i) {
    std::vector<uint64_t>& data = regions_[i].data;
    data.assign((regions_[i].file->page_count() + 63) / 64, 0);
    auto status = each_data_page(i, [&](uint64_t page) { data[page / 64] |= uint64_t{1} << page % 64; });
    if (!status) return status;
  }
  return ok();
}

bool ParentMemory::enter() {
  // F13 pairs with F14 in bar: the visitor counted before, the bar looked at after. Either we see the bar, or
  // bar() sees us.
  visitor_count_.fetch_add(1, std::memory_order_seq_cst);
  if (!is_barred_.load(std::memory_order_seq_cst)) return true;
  leave();
  return false;
}

void ParentMemory::bar() {
  // F14 pairs with F13 in enter.
  is_barred_.store(true, std::memory_order_seq_cst);
  // A17 pairs with R17 in leave (sequentially consistent, for F14): every ioctl of a visitor comes before
  // what follows here. A visit is the copying of one cluster.
  while (visitor_count_.load(std::memory_order_seq_cst) != 0) ::sched_yield();
}

}  // namespace vmigrate::pager
