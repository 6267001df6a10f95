#pragma once

// A near holder of an image that FetchHarness fills: the test decides which pages it has, and what it
// answers.

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "tests/image/fetch_harness.hpp"

namespace vmigrate::test {

/// It has the bytes of the root's files. Region 0 only is looked at by set.
class FakeNear {
 public:
  enum class Kind { kThread, kDevice };
  FakeNear(FetchHarness& host, uint32_t holder_id, uint32_t holder_level = 0, Kind kind = Kind::kThread);
  /// Its endpoints read from it.
  ~FakeNear();
  FakeNear(const FakeNear&) = delete;
  FakeNear& operator=(const FakeNear&) = delete;

  void set(uint64_t page, wire::PageState state, uint32_t region = 0) {
    set_raw(page, static_cast<uint8_t>(state), region);
  }
  void set_raw(uint64_t page, uint8_t byte, uint32_t region = 0);
  /// These pages are here, as the root has them: data or holes.
  void have(const std::function<bool(uint64_t)>& which);
  void have_all();
  wire::PageState state(uint64_t page, uint32_t region = 0) const;
  /// Other bytes than those of the root's files.
  void serve_file(int fd) { file_ = fd; }

  pager::SourceEndpoints endpoints();
  Status add();
  pager::NearSnapshot snapshot() const;
  [[nodiscard]] bool is_dropped(ErrorCode code) const;
  bool reads_pages(const transport::Operation& op) const { return region_of(op) >= 0; }

  const uint32_t id, level;
  /// By default the host removes it.
  std::function<void()> before_gone;
  std::shared_ptr<FakeControl> demand, bulk;
  std::atomic<uint64_t> demand_reads{0}, bulk_reads{0}, looks{0};
  /// What it answers to READs of states, and of pages that are there.
  std::atomic<transport::OpResult> look_result{transport::OpResult::kOk},
      page_result{transport::OpResult::kOk};
  /// Otherwise READs of pages are answered without a look.
  std::atomic<bool> is_honest{true};

 private:
  std::unique_ptr<transport::Endpoint> endpoint(const std::shared_ptr<FakeControl>& control);
  int region_of(const transport::Operation& op) const;

  FetchHarness& host_;
  const Kind kind_;
  FakeSource source_;
  std::vector<UniqueFd> states_;
  std::vector<std::shared_ptr<FakeControl>> controls_;
  std::vector<pager::SourceRegionKeys> keys_;
  int file_ = -1;
};

/// An image of one region of which each fourth page is a hole.
class NearTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kPages = 4096, kDataPages = kPages / 4 * 3;
  static bool is_data(uint64_t page) { return page % 4 != 3; }
  NearTest();
  ~NearTest() override;
  /// A session whose data map is known. Nothing but faults makes it read.
  void start();
  uint64_t from_root() const;
  uint64_t from_near() const { return host.counter(wire::ImageCounter::kNearBytes); }
  void sweep_to_the_end();

  FetchHarness host;
};

}  // namespace vmigrate::test
