#pragma once

// A "VM": a second mapping of the region files, registered with real userfaultfds. Threads that touch it are
// its vCPUs.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/inject_point.hpp"
#include "gtest/gtest.h"
#include "source/data_map.hpp"
#include "target/target.hpp"
#include "tests/support/fake_endpoint.hpp"
#include "tests/support/hooked.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::test {

using namespace std::chrono_literals;

inline constexpr uint64_t kPage = 4096;

/// The content of page `page` of a source region: every word differs, none is zero.
inline uint64_t pattern_word(uint64_t seed, uint64_t page, uint64_t word) {
  uint64_t x = seed * 0x9e3779b97f4a7c15ull + page * 512 + word + 1;
  x ^= x >> 31;
  x *= 0xbf58476d1ce4e5b9ull;
  return x | 1;
}

void write_pattern(int fd, uint64_t seed, uint64_t page);

/// -1 if the kernel gives none.
int open_userfaultfd();

/// How long to wait for an expected event. It is not a measurement, because a loaded machine may take long.
inline constexpr std::chrono::seconds kPatience{30};

bool eventually(const std::function<bool()>& condition, std::chrono::milliseconds limit = kPatience);

/// Parks threads at one injection point until they are released. Counts how often every point is passed.
class Parking {
 public:
  Parking();
  ~Parking();
  /// The next thread that meets `point` (with this detail, if given) stops there.
  void arm(wire::InjectPoint point, std::optional<uint64_t> detail = std::nullopt);
  [[nodiscard]] bool wait_parked();
  void release();

 private:
  friend class Hooked<Parking>;
  void meet(wire::InjectPoint point, uint64_t detail);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<wire::InjectPoint> armed_;
  std::optional<uint64_t> detail_;
  bool parked_ = false;
  bool released_ = false;
};

struct VmRegion {
  std::string source_path, target_path, presence_path;
  uint64_t page_count = 0;
  uint64_t page_bytes = kPage;
  uint64_t seed = 0;
  std::vector<bool> data;
  std::vector<uint64_t> seeds;  // one per 4 KiB page
  UniqueFd source_fd;
  std::unique_ptr<pager::DataMap> map;
  std::unique_ptr<pager::DataMap> dirty;  // the source tracks the writes of its VM
  std::byte* base = nullptr;              // the VM's mapping
  uint64_t length_bytes() const { return page_count * page_bytes; }
};

/// Source files, target files, the VM's mappings, and a target session over fake endpoints.
class PagerHarness {
 public:
  /// `has_data(page)`: which pages of a region are not holes. In units of 4 KiB pages.
  struct RegionSpec {
    uint64_t page_count;
    std::function<bool(uint64_t)> has_data = [](uint64_t) { return true; };
    uint64_t page_bytes = kPage;
  };

  using Specs = std::vector<RegionSpec>;
  explicit PagerHarness(Specs specs, std::string target_dir = {});
  ~PagerHarness();

  void map_vm();
  std::vector<pager::TargetRegionConfig> configs() const;
  void open(bool resume = false, const pager::TargetOptions& options = {});
  /// Creates new connections and new keys.
  pager::SourceEndpoints endpoints();
  /// Ends the source's scan: sets bits and `ready`.
  void finish_maps();
  /// The source's VM writes to these pages, by another seed, so that they hold data; the maps of written
  /// pages say so.
  void rewrite(size_t region, const std::vector<uint64_t>& pages, uint32_t round);
  /// Does everything up to a session that is serving. With `maps_ready` false prefetch has not begun.
  void start(bool maps_ready = true, const pager::TargetOptions& options = {});

  /// A vCPU's read of a page's first word, on a thread of its own.
  std::future<uint64_t> touch(size_t region, uint64_t page, uint64_t word = 0);
  static bool waits(std::future<uint64_t>& reading, std::chrono::milliseconds time = 50ms);
  static bool arrives(std::future<uint64_t>& reading);
  uint64_t expected(size_t region, uint64_t page, uint64_t word = 0) const;
  /// Reads every word of every page through the VM's mapping.
  uint64_t bad_pages() const;
  [[nodiscard]] bool reaches(pager::TargetState state);
  uint64_t counter(wire::TargetCounter which) const;

  TempDir dir_;
  std::string target_dir_;
  FakeSource source;
  std::vector<VmRegion> regions;
  pager::VmMemory memory;
  std::shared_ptr<FakeControl> demand, bulk;
  std::atomic<int> edges{0};
  std::unique_ptr<pager::TargetSession> session;  // last, because it uses the rest

 private:
  void add_region(size_t index, const RegionSpec& spec);
};

}  // namespace vmigrate::test
