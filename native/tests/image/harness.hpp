#pragma once

// A parent and clones inside the test's own process: mappings of the region files, registered with real
// userfaultfds. Threads that touch them are vCPUs.

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

#include "image/capture.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::test {

/// Which pages have content: the others are holes.
inline bool all_but_each_fourth(uint64_t page) {
  return page % 4 != 3;
}

/// With write-protection of shared memory, as the preload asks for. -1 if the kernel does not support it.
int open_write_protect_userfaultfd();

/// A clone's ranges are registered from the start. A clone that has its whole image is a copy-on-write
/// parent.
enum class VmKind { kParent, kClone, kPrivateParent };

/// One VM's mappings of a set of files, with a userfaultfd for each.
class MappedVm {
 public:
  MappedVm(const std::vector<std::string>& paths, const std::vector<uint64_t>& lengths, VmKind kind);
  ~MappedVm();
  MappedVm(const MappedVm&) = delete;
  MappedVm& operator=(const MappedVm&) = delete;

  std::byte* base(uint32_t region) const {
    return reinterpret_cast<std::byte*>(raw(memory.ranges[region].base));
  }
  volatile uint64_t* word(uint32_t region, uint64_t page) const {
    return reinterpret_cast<volatile uint64_t*>(base(region) + page * kPage);
  }
  /// A vCPU's access, on a thread of its own.
  std::future<uint64_t> read(uint64_t page, uint32_t region = 0) const;
  std::future<uint64_t> write(uint64_t page, uint64_t value, uint32_t region = 0) const;
  /// Whether any part of it is registered with a userfaultfd in the kernel.
  bool is_registered() const;

  pager::VmMemory memory;
};

bool waits(std::future<uint64_t>& access, std::chrono::milliseconds time = 50ms);
bool arrives(std::future<uint64_t>& access);

/// Places at which one thread each is parked until it is released. Several may be closed at a time.
class Gates {
 public:
  Gates();
  ~Gates();
  struct Gate {
    wire::InjectPoint point;
    std::optional<uint64_t> detail;
    bool is_parked = false;
    bool is_open = false;
  };
  Gate& close(wire::InjectPoint point, std::optional<uint64_t> detail = std::nullopt);
  [[nodiscard]] bool wait_parked(const Gate& gate);
  void open(Gate& gate);

 private:
  friend class Hooked<Gates>;
  void meet(wire::InjectPoint point, uint64_t detail);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Gate>> gates_;
};

/// Number of capture threads in this process. A thread that was joined is still listed for a moment while the
/// kernel removes it.
size_t image_thread_count();
bool image_threads_end();

/// Region files with a pattern and holes, a parent on them, and a capture of it.
class ImageHarness {
 public:
  struct RegionSpec {
    uint64_t page_count;  ///< of 4 KiB
    std::function<bool(uint64_t)> has_data = [](uint64_t) { return true; };
    uint64_t page_bytes = kPage;
  };

  using Specs = std::vector<RegionSpec>;
  explicit ImageHarness(Specs specs, const std::string& image_dir = {}, VmKind parent_kind = VmKind::kParent,
                        const std::string& source_dir = {});
  ~ImageHarness();

  Result<std::unique_ptr<pager::ImageCapture>> try_open(bool resume, bool has_parent = true);
  void open(bool resume = false, bool has_parent = true);
  void arm();
  void seal(pager::Sweep when = pager::Sweep::kAtOnce);
  /// The expected content of the image: the present content of the parent's files.
  void remember();
  MappedVm& add_clone();
  uint64_t expected(uint64_t page, uint32_t region = 0) const {
    return fork_point[region][page * (kPage / 8)];
  }

  static std::vector<uint64_t> contents(const std::string& path, uint64_t length_bytes);
  uint64_t bad_image_pages() const;
  /// Reads through a clone's own mapping.
  uint64_t bad_pages(const MappedVm& clone) const;
  [[nodiscard]] bool reaches(pager::ImageState state) const;
  uint64_t counter(wire::ImageCounter which) const;

  const bool is_parent_private_;
  TempDir dir_;
  std::vector<std::string> source_paths, image_paths, presence_paths;
  std::vector<uint64_t> lengths, page_sizes;
  std::vector<std::vector<uint64_t>> fork_point;
  std::unique_ptr<MappedVm> parent;
  std::vector<std::unique_ptr<MappedVm>> clones;
  std::atomic<int> edges{0};
  std::unique_ptr<pager::ImageCapture> capture;
};

}  // namespace vmigrate::test
