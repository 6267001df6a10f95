#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/thread_util.hpp"
#include "fetch/core.hpp"

namespace vmigrate::fuzz {

/// Regions that are being filled, and what a fetch of them needs of its session. It is made once: what an
/// input does to it is taken back by reset(), because to make it takes longer than the input. Its files have
/// no names, so that none is left behind.
class Filling : public pager::FetchOwner {
 public:
  Filling(std::span<const uint64_t> page_counts, uint64_t page_bytes);

  pager::FillState& fill() { return *fill_; }
  pager::FetchCore& core() { return *core_; }
  uint64_t page_count(uint32_t region_index) const { return fill_->regions()[region_index].page_count(); }
  uint32_t region_count() const { return static_cast<uint32_t>(fill_->regions().size()); }
  /// All pages are absent, none is counted, no holes are known, and nothing has failed.
  void reset();
  /// The states of the region's pages, one byte a page.
  std::span<std::byte> states(uint32_t region_index);
  memory::PresenceMap& presence(uint32_t region_index) { return *fill_->region(region_index).presence; }

  const std::optional<Error>& failure() const { return failure_; }
  void fail(const Error& error) override {
    if (!failure_) failure_ = error;
  }
  bool must_end() const override { return failure_.has_value(); }
  void on_connection() override {}

 private:
  std::unique_ptr<pager::FillState> fill_;
  pager::WakeEvent demand_wake_;
  std::unique_ptr<pager::FetchCore> core_;
  std::optional<Error> failure_;
};

/// A connection that takes as many READs as it is told, and answers none by itself.
class ScriptedEndpoint final : public transport::Endpoint {
 public:
  /// What the target and the endpoint share; the code under test owns the endpoint.
  struct Control {
    std::vector<transport::Operation> posted;  ///< READs that were taken and not yet looked at
    std::vector<transport::Completion> completions;
    std::vector<transport::LocalMemory> locals;
    size_t room = SIZE_MAX;
    bool is_cut = false;
    bool is_device = false;
    bool is_gone = false;
  };
  explicit ScriptedEndpoint(Control& control) : control_(control) {}
  ~ScriptedEndpoint() override { control_.is_gone = true; }

  Result<transport::LocalId> register_local(const transport::LocalMemory& memory) override;
  transport::PostResult read(std::span<const transport::Operation> operations) override;
  transport::PostResult write(std::span<const transport::Operation>) override;
  size_t poll(std::span<transport::Completion> out) override;
  transport::PostStatus send(std::span<const std::byte>) override;
  size_t receive(std::span<std::byte>) override { return 0; }
  bool disconnected() const override { return control_.is_cut; }
  int event_fd() const override { return -1; }
  bool is_device() const override { return control_.is_device; }

 private:
  Control& control_;
};

}  // namespace vmigrate::fuzz
