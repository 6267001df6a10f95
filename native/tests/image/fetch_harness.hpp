#pragma once

// An image of one host that is filled from a holder (files of the test, over fake connections), with clones
// inside the test's own process.

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "image/fetch.hpp"
#include "tests/image/harness.hpp"

namespace vmigrate::test {

class FetchHarness {
 public:
  using Specs = ImageHarness::Specs;
  /// `image_directory`: where the files of the image are; none: where all others are.
  explicit FetchHarness(const Specs& specs, const std::string& image_directory = {});
  ~FetchHarness();

  /// The holder's maps become final.
  void finish_maps();
  /// The root's digests of the holder's files as they are now, and those of this host, which knows none yet.
  void use_digests();
  /// This host learns the digests up to this page.
  void know(uint64_t end_page, uint32_t region = 0);
  void know_all();
  /// Makes the holder serve a page with one bit flipped, or as it was.
  void serve_damaged(uint64_t page, bool is_damaged, uint32_t region = 0);
  void open(bool resume = false);
  pager::SourceEndpoints endpoints();
  /// Up to a session that serves clones and reads only what they ask for.
  void start();
  MappedVm& add_clone();
  uint64_t expected(uint64_t page, uint32_t region = 0) const {
    return data[region][page] ? pattern_word(region + 1, page, 0) : 0;
  }
  uint64_t bad_pages(const MappedVm& clone) const;
  /// Memory that the image's file of a region takes.
  uint64_t allocated_bytes(uint32_t region = 0) const;
  [[nodiscard]] bool reaches(pager::ImageState state) const;
  uint64_t counter(wire::ImageCounter which) const;

  TempDir dir_;
  FakeSource source;
  std::vector<std::string> holder_paths, image_paths, presence_paths;
  std::vector<UniqueFd> holder_fds;
  std::vector<std::unique_ptr<pager::DataMap>> maps;
  std::vector<std::vector<bool>> data;
  std::vector<uint64_t> lengths;
  std::vector<std::unique_ptr<MappedVm>> clones;
  std::shared_ptr<pager::ImageDigests> root_digests, digests;
  std::shared_ptr<FakeControl> demand, bulk;
  std::atomic<int> edges{0};
  std::unique_ptr<pager::ImageFetch> fetch;
};

}  // namespace vmigrate::test
