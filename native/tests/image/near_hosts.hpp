#pragma once

// Hosts that read the image of a root (files of the test, over fake connections), and that serve what they
// have to one another over a real transport.

#include <gtest/gtest.h>

#include "source/source.hpp"
#include "tests/image/fetch_harness.hpp"
#include "tests/transport/fixture.hpp"

namespace vmigrate::test {

inline const transport::Provider* provider_named(const std::string& name) {
  for (const auto* each : transport::tested_providers())
    if (each->name == name) return each;
  return nullptr;
}

/// A host that reads the root's image, and serves what it has.
class Host {
 public:
  static constexpr uint64_t kPages = 2048, kDataPages = kPages / 4 * 3;
  static bool has_data(uint64_t page) { return page % 4 != 3; }

  Host(FetchHarness& root, transport::Listener& listener, const transport::Provider& by, uint32_t id)
      : id(id), root_(root), listener_(listener), provider_(by) {
    region_ = {root.dir_ / ("host" + std::to_string(id) + ".image"),
               root.dir_ / ("host" + std::to_string(id) + ".presence"), kPages * kPage, kPage};
    EXPECT_TRUE(memory::Region::create_file(region_.path, region_.length_bytes, kPage).ok());
  }
  ~Host() {
    session.reset();
    readers_.clear();
    fetch.reset();
    clones.clear();
  }
  /// Before open(resume): an earlier process has brought these pages.
  void have(const std::function<bool(uint64_t)>& which) {
    auto map = memory::PresenceMap::create(region_.presence_path, kPages, kPage);
    ASSERT_TRUE(map.ok());
    const UniqueFd file(::open(region_.path.c_str(), O_RDWR | O_CLOEXEC));
    for (uint64_t page = 0; page < kPages; ++page) {
      if (!which(page) || !has_data(page)) continue;
      write_pattern(file.get(), 1, page);
      ASSERT_TRUE(map.value()->claim(PageIndex{page}));
      map.value()->publish({PageIndex{page}, 1});
    }
  }
  void open(bool resume = false) {
    auto opened = pager::ImageFetch::open({{region_}, {}, resume, {}, {}});
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    fetch = std::move(opened).value();
  }
  void connect_root() {
    ASSERT_TRUE(fetch->connect(root_.endpoints()).ok());
    demand = root_.demand;
    bulk = root_.bulk;
  }
  /// Up to a session whose data map is known.
  void start(bool resume = false) {
    open(resume);
    connect_root();
    ASSERT_TRUE(fetch->start().ok());
    ASSERT_TRUE(eventually([&] { return counter(wire::ImageCounter::kPagesZero) == kPages - kDataPages; }));
  }
  Status try_serve() {
    session.reset();
    readers_.clear();
    credentials_.session[0] = static_cast<uint8_t>(id + 1);
    credentials_.session[1] = ++sessions_;
    readers_.push_back(fetch->reader(0));
    const pager::SourceRegionConfig config{region_.path, region_.length_bytes, kPage, readers_[0].get()};
    auto opened = pager::SourceSession::open(listener_, credentials_, {&config, 1});
    if (!opened) return opened.error();
    session = std::move(opened).value();
    return ok();
  }
  void serve() {
    const Status served = try_serve();
    ASSERT_TRUE(served.ok()) << served.error().what;
  }
  std::unique_ptr<transport::Endpoint> connect(transport::Channel channel) {
    auto connected = transport::connect(provider_, listener_.address(), credentials_, channel);
    EXPECT_TRUE(connected.ok()) << connected.error().what;
    return connected ? std::move(connected).value() : nullptr;
  }
  pager::SourceEndpoints endpoints() {
    pager::SourceEndpoints result;
    result.demand = connect(transport::Channel::kDemand);
    result.bulk = connect(transport::Channel::kBulk);
    result.keys.assign(session->keys().begin(), session->keys().end());
    return result;
  }
  void read_from(Host& near, uint32_t level = 0) {
    const Status added = fetch->add_near(near.endpoints(), near.id, level);
    ASSERT_TRUE(added.ok()) << added.error().what;
  }
  MappedVm& add_clone() {
    clones.push_back(std::make_unique<MappedVm>(std::vector{region_.path}, std::vector{region_.length_bytes},
                                                VmKind::kClone));
    EXPECT_TRUE(fetch->add_clone(clones.back()->memory).ok());
    return *clones.back();
  }
  [[nodiscard]] bool reaches(pager::ImageState state) const {
    return eventually([&] { return fetch->state() == state; });
  }
  uint64_t counter(wire::ImageCounter which) const {
    std::array<uint64_t, wire::kImageCounterCount> all{};
    fetch->counters(all);
    return all[static_cast<size_t>(which)];
  }
  uint64_t from_root() const {
    return counter(wire::ImageCounter::kDemandBytes) + counter(wire::ImageCounter::kPrefetchBytes);
  }
  uint64_t from_near() const { return counter(wire::ImageCounter::kNearBytes); }
  void is_right() {
    ASSERT_TRUE(reaches(pager::ImageState::kComplete));
    EXPECT_EQ(root_.bad_pages(add_clone()), 0u) << id;
    EXPECT_EQ(ImageHarness::contents(region_.path, kPages * kPage),
              ImageHarness::contents(root_.holder_paths[0], kPages * kPage));
  }

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

  void SetUp() override {
    listener = transport::must_listen(*provider_named("tcp"));
    root.finish_maps();
    for (uint32_t id = 0; id < 3; ++id)
      hosts.push_back(std::make_unique<Host>(root, *listener, *provider_named("tcp"), id));
  }
  void TearDown() override { hosts.clear(); }
  Host& host(size_t index) { return *hosts[index]; }

  FetchHarness root{FetchHarness::Specs{{kPages, has_data}}};
  std::unique_ptr<transport::Listener> listener;
  std::vector<std::unique_ptr<Host>> hosts;
};

}  // namespace vmigrate::test
