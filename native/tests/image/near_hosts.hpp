#pragma once

// Hosts that read the image of a root (files of the test, over fake connections), and that serve what they
// have to one another over a real transport.

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "source/source.hpp"
#include "tests/image/fetch_harness.hpp"
#include "tests/transport/fixture.hpp"

namespace vmigrate::test {

const transport::Provider* provider_named(const std::string& name);

/// A host that reads the root's image, and serves what it has.
class Host {
 public:
  static constexpr uint64_t kPages = 2048, kDataPages = kPages / 4 * 3;
  static bool has_data(uint64_t page) { return page % 4 != 3; }

  Host(FetchHarness& root, transport::Listener& listener, const transport::Provider& by, uint32_t id);
  ~Host();
  /// Before open(resume): an earlier process has brought these pages.
  void have(const std::function<bool(uint64_t)>& which);
  void open(bool resume = false);
  void connect_root();
  /// Up to a session whose data map is known.
  void start(bool resume = false);
  Status try_serve();
  void serve();
  std::unique_ptr<transport::Endpoint> connect(transport::Channel channel);
  pager::SourceEndpoints endpoints();
  void read_from(Host& near, uint32_t level = 0);
  MappedVm& add_clone();
  [[nodiscard]] bool reaches(pager::ImageState state) const;
  uint64_t counter(wire::ImageCounter which) const;
  uint64_t from_root() const;
  uint64_t from_near() const { return counter(wire::ImageCounter::kNearBytes); }
  void is_right();

  const uint32_t id;
  std::unique_ptr<pager::ImageFetch> fetch;
  std::unique_ptr<pager::SourceSession> session;
  std::shared_ptr<FakeControl> demand, bulk;
  std::vector<std::unique_ptr<MappedVm>> clones;

 private:
  FetchHarness& root_;
  transport::Listener& listener_;
  const transport::Provider& provider_;
  pager::TargetRegionConfig region_;
  std::vector<std::unique_ptr<pager::RegionReader>> readers_;
  transport::Credentials credentials_;
  uint8_t sessions_ = 0;
};

class HostsTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kPages = Host::kPages, kDataPages = Host::kDataPages;
  static bool has_data(uint64_t page) { return Host::has_data(page); }

  HostsTest();
  ~HostsTest() override;
  void SetUp() override;
  void TearDown() override;
  Host& host(size_t index) { return *hosts[index]; }

  FetchHarness root;
  std::unique_ptr<transport::Listener> listener;
  std::vector<std::unique_ptr<Host>> hosts;
};

}  // namespace vmigrate::test
