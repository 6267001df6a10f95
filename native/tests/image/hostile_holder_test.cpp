// Tests what a holder, its transport or a caller may do at a bad moment while an image is read from it.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <thread>

#include "fetch/limits.hpp"
#include "source/source.hpp"
#include "tests/image/fetch_harness.hpp"
#include "tests/transport/fixture.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::FakeControl;
using test::FetchHarness;
using test::ImageHarness;
using test::kPage;
using wire::ImageCounter;

/// An endpoint with hooks. As a device, its descriptor says nothing while it is polled, like a
/// VerbsEndpoint's.
class HookedEndpoint final : public transport::Endpoint {
 public:
  HookedEndpoint(std::unique_ptr<transport::Endpoint> inner, std::shared_ptr<FakeControl> control)
      : inner_(std::move(inner)), control_(std::move(control)), fd_(inner_->event_fd()) {}
  Result<transport::LocalId> register_local(const transport::LocalMemory& m) override {
    if (on_register) on_register();
    return inner_->register_local(m);
  }
  transport::PostResult read(std::span<const transport::Operation> o) override { return inner_->read(o); }
  transport::PostResult write(std::span<const transport::Operation> o) override { return inner_->write(o); }
  size_t poll(std::span<transport::Completion> out) override {
    if (before_poll) before_poll();
    const size_t count = inner_->poll(out);
    if (after_poll) after_poll(out.first(count));
    return count;
  }
  transport::PostStatus send(std::span<const std::byte> m) override { return inner_->send(m); }
  size_t receive(std::span<std::byte> m) override { return inner_->receive(m); }
  bool disconnected() const override { return inner_->disconnected(); }
  int event_fd() const override { return fd_; }
  bool is_device() const override { return is_a_device; }
  void set_polled(bool polled) override {
    const std::lock_guard lock(control_->mutex);
    control_->event_fd = polled ? -1 : fd_;
    if (!polled) control_->kick();
  }
  std::function<void()> on_register, before_poll;
  std::function<void(std::span<transport::Completion>)> after_poll;
  bool is_a_device = true;

 private:
  std::unique_ptr<transport::Endpoint> inner_;
  std::shared_ptr<FakeControl> control_;
  int fd_;
};

TEST(ImageFetch, ADeviceWakesTheThreadThatSleeps) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  host.open();
  auto endpoints = host.endpoints();
  endpoints.demand = std::make_unique<HookedEndpoint>(std::move(endpoints.demand), host.demand);
  ASSERT_TRUE(host.fetch->connect(std::move(endpoints)).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  auto& clone = host.add_clone();
  std::this_thread::sleep_for(100ms);
  host.demand->hold_all();
  auto reading = clone.read(8);
  ASSERT_TRUE(test::eventually([&] { return host.demand->held_count() == 1; }));
  std::this_thread::sleep_for(100ms);
  host.demand->release_all();  // the device is done
  ASSERT_TRUE(arrives(reading));
}

TEST(ImageReader, AMapCanBeMadeOfACompleteCapture) {
  ImageHarness root(ImageHarness::Specs{{64, [](uint64_t page) { return page % 4 != 3; }}});
  root.open();
  const auto reader = root.capture->reader(0);
  root.arm();
  root.seal(Sweep::kAtOnce);
  ASSERT_TRUE(root.reaches(ImageState::kComplete));
  std::vector<std::byte> bytes(kPage);
  EXPECT_TRUE(reader->read(0, bytes).ok());
  uint64_t pages = 0;
  const Status looked = reader->each_data_run([&](PageRun run) { pages += run.count; });
  EXPECT_TRUE(looked.ok()) << looked.error().what;
  EXPECT_EQ(pages, 48u);
}

TEST(ImageFetch, AHoleIsMappedWhenTheMapSaysSo) {
  FetchHarness host(FetchHarness::Specs{{512, [](uint64_t page) { return page != 300; }}});
  host.start();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t page = 0; page < kDemandFetchesMax; ++page) readings.push_back(clone.read(page));
  ASSERT_TRUE(test::eventually([&] { return host.demand->held_count() == kDemandFetchesMax; }));
  auto hole = clone.read(300);
  ASSERT_TRUE(test::eventually(
      [&] { return host.counter(ImageCounter::kCloneFaultCount) == kDemandFetchesMax + 1; }));
  host.finish_maps();
  ASSERT_TRUE(test::eventually([&] { return host.counter(ImageCounter::kPagesZero) == 1; }));
  ASSERT_TRUE(arrives(hole));
  EXPECT_EQ(hole.get(), 0u);
  host.demand->release_all();
}

TEST(ImageFetch, AReadThatTheTransportDidNotTakeIsPostedAgain) {
  FetchHarness host(FetchHarness::Specs{{512}});
  host.finish_maps();
  host.start();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t page = 0; page < kDemandFetchesMax + 1; ++page) readings.push_back(clone.read(page));
  ASSERT_TRUE(test::eventually([&] { return host.demand->held_count() == kDemandFetchesMax; }));
  ASSERT_TRUE(test::eventually(
      [&] { return host.counter(ImageCounter::kCloneFaultCount) == kDemandFetchesMax + 1; }));
  std::this_thread::sleep_for(50ms);
  {
    const std::lock_guard lock(host.demand->mutex);
    host.demand->capacity = 0;  // would block for a moment
  }
  host.demand->release_all();
  ASSERT_TRUE(
      test::eventually([&] { return host.counter(ImageCounter::kPagesCopied) == kDemandFetchesMax; }));
  std::this_thread::sleep_for(50ms);
  {
    const std::lock_guard lock(host.demand->mutex);
    host.demand->capacity = 64;
  }
  for (auto& reading : readings) ASSERT_TRUE(arrives(reading));
}

TEST(ImageFetch, AConnectThatEndsAfterCloseIsRefused) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  host.start();
  host.demand->disconnect();
  ASSERT_TRUE(host.reaches(ImageState::kDisconnected));
  auto endpoints = host.endpoints();
  auto slow = std::make_unique<HookedEndpoint>(std::move(endpoints.demand), host.demand);
  slow->is_a_device = false;
  std::promise<void> entered, go;
  bool first = true;
  slow->on_register = [&] {
    if (!first) return;
    first = false;
    entered.set_value();
    go.get_future().wait();
  };
  endpoints.demand = std::move(slow);
  auto connecting =
      std::async(std::launch::async, [&] { return host.fetch->connect(std::move(endpoints)).ok(); });
  entered.get_future().wait();
  host.fetch->close();
  EXPECT_EQ(host.fetch->state(), ImageState::kClosed);
  go.set_value();
  EXPECT_FALSE(connecting.get());
  EXPECT_TRUE(host.demand->was_destroyed());
}

TEST(ImageFetch, AMessageOfTheHolderDoesNotKeepTheThreadAwake) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  const transport::Provider* tcp = nullptr;
  for (const auto* provider : transport::tested_providers())
    if (std::string(provider->name) == "tcp") tcp = provider;
  ASSERT_NE(tcp, nullptr);
  auto listener = transport::must_listen(*tcp);
  transport::Credentials credentials;
  credentials.session[0] = 1;
  auto exposed = listener->expose_session(
      credentials, [](void*, transport::Channel, std::span<const std::byte>) {}, nullptr);
  ASSERT_TRUE(exposed.ok());
  auto ram_region =
      memory::Region::open(host.holder_paths[0], host.lengths[0], kPage, memory::Mode::kReadOnly);
  ASSERT_TRUE(ram_region.ok());
  auto ram = exposed.value()->expose({.base = ram_region.value()->base(),
                                      .fd = ram_region.value()->fd(),
                                      .fd_offset_bytes = 0,
                                      .length_bytes = host.lengths[0]},
                                     transport::Access::kRead);
  auto map = exposed.value()->expose(host.maps[0]->readable(), transport::Access::kRead);
  ASSERT_TRUE(ram.ok() && map.ok());
  SourceEndpoints endpoints;
  for (auto [channel, endpoint] : {std::pair{transport::Channel::kDemand, &endpoints.demand},
                                   {transport::Channel::kBulk, &endpoints.bulk}}) {
    auto connected = transport::connect(*tcp, listener->address(), credentials, channel);
    ASSERT_TRUE(connected.ok());
    *endpoint = std::move(connected).value();
  }
  endpoints.keys.push_back({ram.value(), map.value()});
  host.open();
  ASSERT_TRUE(host.fetch->connect(std::move(endpoints)).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(clone.read(3).get(), host.expected(3));
  std::this_thread::sleep_for(100ms);
  const std::byte message[1] = {std::byte{1}};
  ASSERT_EQ(exposed.value()->send(transport::Channel::kDemand, message), transport::PostStatus::kPosted);
  std::this_thread::sleep_for(100ms);
  const uint64_t before = host.counter(ImageCounter::kCpuNs);
  std::this_thread::sleep_for(1s);
  EXPECT_LT(host.counter(ImageCounter::kCpuNs) - before, 100'000'000u);
  host.fetch->close();
  exposed.value().reset();
}

TEST(ImageFetch, AConnectDuringStartDoesNotTouchTheMapsBuffer) {
  FetchHarness host(FetchHarness::Specs{{64, [](uint64_t page) { return page == 0; }}, {64}});
  host.finish_maps();
  host.open();
  std::promise<void> go, probed;
  auto first = host.endpoints();
  auto bulk = std::make_unique<HookedEndpoint>(std::move(first.bulk), host.bulk);
  bulk->is_a_device = false;
  int maps = 0;
  bulk->after_poll = [&](std::span<transport::Completion> done) {
    for (const auto& each : done) {
      if ((each.tag >> 63) == 0 || ++maps != 4) continue;
      go.set_value();
      probed.get_future().wait();
    }
  };
  first.bulk = std::move(bulk);
  ASSERT_TRUE(host.fetch->connect(std::move(first)).ok());
  auto second = host.endpoints();
  second.probe_timeout = 20s;
  auto demand = std::make_unique<HookedEndpoint>(std::move(second.demand), host.demand);
  demand->is_a_device = false;
  bool waited = false, told = false;
  demand->before_poll = [&] {
    if (!std::exchange(waited, true)) go.get_future().wait();
  };
  demand->after_poll = [&](std::span<transport::Completion> done) {
    if (!done.empty() && !std::exchange(told, true)) probed.set_value();
  };
  second.demand = std::move(demand);
  auto connecting =
      std::async(std::launch::async, [&] { return host.fetch->connect(std::move(second)).ok(); });
  std::this_thread::sleep_for(100ms);  // it is probing
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  (void)connecting.get();
  auto& clone = host.add_clone();
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
}

TEST(ImageFetch, ACloneThatWasRefusedIsForgotten) {
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  host.start();
  auto clone = std::make_unique<test::MappedVm>(host.image_paths, host.lengths, test::VmKind::kClone);
  const int file = ::open(host.image_paths[0].c_str(), O_RDWR | O_CLOEXEC);  // epoll refuses it
  clone->memory.descriptors.push_back({UniqueFd(file), file, wire::PreloadDescriptor::kSync});
  EXPECT_FALSE(host.fetch->add_clone(clone->memory).ok());
  EXPECT_NE(host.fetch->add_clone(clone->memory).error().code, ErrorCode::kAlreadyExists);
  host.fetch->remove_clone(clone->memory);
}

}  // namespace
}  // namespace vmigrate::pager
