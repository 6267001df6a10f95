// Tests when the thread of near bulk reads, without the other threads of a fetch: beside a multicast, and
// when nothing is left to bring.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <thread>

#include "fetch/near/bulk.hpp"
#include "image/holder/page_gate.hpp"
#include "tests/image/near_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::eventually;
using test::FakeNear;
using test::FetchHarness;
using test::kPage;
using wire::PageState;
using Feed = NearerFeeds::Feed;

constexpr uint64_t kFeedPages = 2048;

class NearFeed : public ::testing::Test, private FetchOwner, private NearSink {
 protected:
  NearFeed() {
    auto opened =
        ImageCore::open(std::vector<TargetRegionConfig>{{host.image_paths[0], host.presence_paths[0],
                                                         host.lengths[0], kPage}},
                        false, {});
    EXPECT_TRUE(opened.ok());
    core = std::move(opened).value();
    fetch.emplace(core->fill(), options, core->serve_wake, static_cast<FetchOwner&>(*this));
    gate.emplace(*core, *fetch, nullptr, true);
    holders.emplace(*fetch);
    bulk.emplace(*fetch, *holders, static_cast<NearSink&>(*this));
    fetch->set_maps_known(1);
  }
  void stop() {
    is_ending = true;
    fetch->wake_lanes();
    if (thread.joinable()) thread.join();
    holders->end();
  }
  void run() {
    thread = std::thread([this] { bulk->run(); });
  }
  Status add(FakeNear& near) {
    near.before_gone = [this] { stop(); };
    return holders->add(near.endpoints(), near.id, near.level);
  }
  uint64_t pages() { return core->fill().pages_present(); }
  bool is_held_back() { return fetch->nearer.holds_back_until_ns(now_ns()) != 0; }
  /// Whether a feed is open, silent or not.
  bool is_open() { return fetch->nearer.holds_back_until_ns(0) != 0; }

  void fail(const Error& error) override { FAIL() << error.what; }
  bool must_end() const override { return is_ending; }
  void on_connection() override {}
  uint64_t publish(uint32_t region_index, PageRun run) override {
    return gate->publish(region_index, run, PageGate::Origin::kNear);
  }
  void give_back(uint32_t region_index, PageRun run) override { gate->give_back(region_index, run); }

  FetchHarness host{FetchHarness::Specs{{kFeedPages}}};
  FetchOptions options;
  std::unique_ptr<ImageCore> core;
  std::optional<FetchCore> fetch;
  std::optional<PageGate> gate;
  std::optional<NearHolders> holders;
  std::optional<NearBulkThread> bulk;
  std::atomic<bool> is_ending{false};
  std::thread thread;
};

TEST_F(NearFeed, WaitsUntilAMulticastHasEnded) {
  FakeNear near(host, 1);
  near.have_all();
  // As if it brought pages all the time.
  fetch->nearer.open(now_ns() + uint64_t{3600} * 1'000'000'000);
  ASSERT_TRUE(add(near).ok());
  run();
  std::this_thread::sleep_for(std::chrono::nanoseconds(kNearerSilentNs) + 200ms);
  EXPECT_EQ(near.looks, 0u);
  EXPECT_EQ(pages(), 0u);
  fetch->nearer.close();
  EXPECT_TRUE(is_open()) << "the root's sweep does not begin in between";
  fetch->wake_bulk();
  ASSERT_TRUE(eventually([&] { return pages() == kFeedPages; }));
}

TEST_F(NearFeed, AndNotLongerThanItBringsPages) {
  FakeNear near(host, 1);
  near.have_all();
  const uint64_t from_ns = now_ns();
  fetch->nearer.open(from_ns);
  ASSERT_TRUE(add(near).ok());
  run();
  ASSERT_TRUE(eventually([&] { return pages() == kFeedPages; }));
  EXPECT_GE(now_ns() - from_ns, kNearerSilentNs);
}

TEST_F(NearFeed, ClosesWhenNothingIsLeftAndOpensForAnother) {
  FakeNear near(host, 1), other(host, 2);
  // Few pages, so that the thread sleeps before it looks for more and finds nothing.
  near.have([](uint64_t page) { return page < 10; });
  other.have_all();
  // The rest is being brought by somebody else.
  ASSERT_EQ(core->region(0).presence->claim_run(PageIndex{10}, kFeedPages - 10), kFeedPages - 10);
  ASSERT_TRUE(add(near).ok());
  EXPECT_TRUE(is_open());
  run();
  ASSERT_TRUE(eventually([&] { return pages() == 10; }));
  ASSERT_TRUE(eventually([&] { return !is_open(); }));
  const uint64_t looks = near.looks;
  std::this_thread::sleep_for(150ms);
  EXPECT_EQ(near.looks, looks) << "it looks no more";
  gate->give_back(0, {PageIndex{1500}, 10});
  ASSERT_TRUE(eventually([&] { return near.looks != looks; })) << "a claim was given back";
  ASSERT_TRUE(add(other).ok());
  EXPECT_TRUE(is_open());
  ASSERT_TRUE(eventually([&] { return pages() == 20; }));
}

TEST_F(NearFeed, AHolderThatBringsLittleHoldsNobodyBack) {
  FakeNear near(host, 1);
  ASSERT_TRUE(add(near).ok());
  run();
  // A page in each 100 ms, for more than a second.
  for (uint64_t page = 0; page < 15; ++page) {
    near.set(page, PageState::kPresent);
    std::this_thread::sleep_for(100ms);
  }
  EXPECT_TRUE(eventually([&] { return pages() == 15; }));
  EXPECT_FALSE(is_held_back());
}

TEST_F(NearFeed, ClosesWithTheLastHolder) {
  FakeNear near(host, 1);
  ASSERT_TRUE(add(near).ok());
  run();
  ASSERT_TRUE(eventually([&] { return near.looks != 0; }));
  EXPECT_TRUE(is_open());
  near.bulk->disconnect();
  EXPECT_TRUE(eventually([&] { return !is_open(); }));
}

}  // namespace
}  // namespace vmigrate::pager
