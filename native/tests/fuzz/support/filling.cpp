#include "tests/fuzz/support/filling.hpp"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "base/check.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::fuzz {

Filling::Filling(std::span<const uint64_t> page_counts, uint64_t page_bytes) {
  std::string folder = "/dev/shm/vmigrate-fuzz-XXXXXX";
  VMG_CHECK(::mkdtemp(folder.data()) != nullptr);
  std::vector<pager::TargetRegionConfig> configs;
  for (const uint64_t page_count : page_counts) {
    const std::string path = folder + "/" + std::to_string(configs.size());
    configs.push_back({path, path + ".states", page_count * page_bytes, page_bytes});
    const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    VMG_CHECK(::ftruncate(fd.get(), static_cast<off_t>(page_count * page_bytes)) == 0);
  }
  fill_ = pager::FillState::open(configs, false, [] {}).value();
  for (const auto& config : configs) {
    ::unlink(config.path.c_str());
    ::unlink(config.presence_path.c_str());
  }
  ::rmdir(folder.c_str());
  core_ = std::make_unique<pager::FetchCore>(*fill_, pager::FetchOptions{}, demand_wake_, *this);
}

std::span<std::byte> Filling::states(uint32_t region_index) {
  return {presence(region_index).bytes(), page_count(region_index)};
}

void Filling::reset() {
  for (uint32_t region = 0; region < region_count(); ++region)
    std::memset(states(region).data(), 0, page_count(region));
  // The counts are unsigned: this takes back what was added.
  if (const uint64_t present = fill_->pages_present()) fill_->add_present(uint64_t{0} - present);
  if (const uint64_t zero = fill_->pages_zero()) fill_->add_zero(uint64_t{0} - zero);
  if (core_->maps_known() != 0) core_->set_maps_known(0);
  failure_.reset();
}

Result<transport::LocalId> ScriptedEndpoint::register_local(const transport::LocalMemory& memory) {
  control_.locals.push_back(memory);
  return static_cast<transport::LocalId>(control_.locals.size() - 1);
}

transport::PostResult ScriptedEndpoint::read(std::span<const transport::Operation> operations) {
  if (control_.is_cut) return {0, transport::PostStatus::kDisconnected};
  size_t posted = 0;
  for (const transport::Operation& operation : operations) {
    if (control_.room == 0) return {posted, transport::PostStatus::kWouldBlock};
    VMG_CHECK(operation.length_bytes != 0 && operation.length_bytes <= wire::kTransferBytesMax);
    const transport::LocalMemory& local = control_.locals.at(static_cast<size_t>(operation.local));
    VMG_CHECK(operation.local_offset_bytes <= local.length_bytes &&
              operation.length_bytes <= local.length_bytes - operation.local_offset_bytes);
    VMG_CHECK(operation.remote_offset_bytes <= operation.remote.length_bytes &&
              operation.length_bytes <= operation.remote.length_bytes - operation.remote_offset_bytes);
    control_.posted.push_back(operation);
    --control_.room;
    ++posted;
  }
  return {posted, transport::PostStatus::kPosted};
}

transport::PostResult ScriptedEndpoint::write(std::span<const transport::Operation>) {
  return {0, transport::PostStatus::kDisconnected};
}

size_t ScriptedEndpoint::poll(std::span<transport::Completion> out) {
  const size_t count = std::min(out.size(), control_.completions.size());
  std::copy_n(control_.completions.begin(), count, out.begin());
  control_.completions.erase(control_.completions.begin(),
                             control_.completions.begin() + static_cast<std::ptrdiff_t>(count));
  return count;
}

transport::PostStatus ScriptedEndpoint::send(std::span<const std::byte>) {
  return transport::PostStatus::kDisconnected;
}

}  // namespace vmigrate::fuzz
