// Tests both sides of the pager over the real transports: SourceSession, provider, TargetSession,
// userfaultfd.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "source/source.hpp"
#include "target/target.hpp"
#include "tests/support/pager_harness.hpp"
#include "tests/transport/fixture.hpp"
#include "transport/testing/faulty.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::kPage;
using test::PagerHarness;
using transport::Channel;
using transport::Provider;
using wire::SourceCounter;
using wire::TargetCounter;

struct Wire {
  const Provider* provider;
  bool faulty;
};
void PrintTo(const Wire& tested, std::ostream* out) {
  *out << tested.provider->name << (tested.faulty ? ", faulty" : "");
}

class PagerTransport : public ::testing::TestWithParam<Wire> {
 protected:
  void SetUp() override {
    if (const std::string missing = transport::missing_for(provider()); !missing.empty())
      GTEST_SKIP() << missing;
  }
  const Provider& provider() const { return *GetParam().provider; }
  void listen() { listener_ = transport::must_listen(provider()); }
  /// A source that serves the harness' source files under its own token.
  void open_source(const PagerHarness& vm, uint8_t number) {
    credentials_.session[0] = number;
    credentials_.token[5] = static_cast<uint8_t>(number + 1);
    std::vector<SourceRegionConfig> configs;
    for (const auto& region : vm.regions) {
      configs.push_back({region.source_path, region.length_bytes(), region.page_bytes});
    }
    auto opened = SourceSession::open(*listener_, credentials_, configs);
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    source_ = std::move(opened).value();
  }
  std::unique_ptr<transport::Endpoint> connect(Channel channel) {
    auto endpoint = transport::connect(provider(), listener_->address(), credentials_, channel);
    EXPECT_TRUE(endpoint.ok()) << endpoint.error().what;
    if (!endpoint.ok() || !GetParam().faulty) return std::move(endpoint).value();
    transport::FaultyOptions faults;
    faults.seed = 7;
    faults.completion_delay_polls_max = 3;
    faults.reorder_completions = true;
    faults.would_block_permille = 100;
    faults.short_batches = true;
    return std::move(transport::make_faulty(std::move(endpoint).value(), faults)).value();
  }
  SourceEndpoints endpoints() {
    const auto keys = source_->keys();
    SourceEndpoints result;
    result.demand = connect(Channel::kDemand);
    result.bulk = connect(Channel::kBulk);
    result.keys.assign(keys.begin(), keys.end());
    return result;
  }
  uint64_t source_counter(SourceCounter which) const {
    std::array<uint64_t, wire::kSourceCounterCount> all{};
    source_->counters(all);
    return all[static_cast<size_t>(which)];
  }

  transport::Credentials credentials_;
  std::unique_ptr<transport::Listener> listener_;
  std::unique_ptr<SourceSession> source_;
};

TEST_P(PagerTransport, MovesEveryByteUnderFaultsOfSeveralVcpus) {
  const auto has_data = [](uint64_t page) { return page % 4 != 3 && (page < 3000 || page > 3500); };
  PagerHarness vm(PagerHarness::Specs{{4096, has_data}, {100}});
  listen();
  open_source(vm, 1);
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  // The guest runs on before the source knows its holes.
  auto early = vm.touch(0, 4095 - 1);
  ASSERT_TRUE(PagerHarness::arrives(early));
  EXPECT_EQ(early.get(), vm.expected(0, 4094));
  ASSERT_TRUE(source_->scan().ok());
  std::atomic<uint64_t> bad{0};
  std::vector<std::thread> vcpus;
  for (uint32_t t = 0; t < 3; ++t) {
    vcpus.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 1500; ++i) {
        const uint64_t page = random() % 4096;
        const auto* words = reinterpret_cast<const volatile uint64_t*>(vm.regions[0].base + page * kPage);
        const uint64_t word = random() % 512;
        if (words[word] != vm.expected(0, page, word)) ++bad;
      }
    });
  }
  for (auto& vcpu : vcpus) vcpu.join();
  EXPECT_EQ(bad, 0u);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
  EXPECT_FALSE(vm.session->failure());
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent) + vm.counter(TargetCounter::kPagesZero), 4196u);
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes) + vm.counter(TargetCounter::kPrefetchBytes),
            vm.counter(TargetCounter::kPagesPresent) * kPage)
      << "every page came once";
  uint64_t holes = 0;
  for (uint64_t page = 0; page < 4096; ++page) holes += has_data(page) ? 0 : 1;
  if (!provider().shares_files) {  // shm reads holes through a mapping, and so fills them
    EXPECT_EQ(source_counter(SourceCounter::kZeroPages), holes) << "also where exposing has filled them";
  }
  if (provider().serves_by_thread) {  // otherwise the source takes no part in a read
    EXPECT_GE(source_counter(SourceCounter::kReadBytes), vm.counter(TargetCounter::kPagesPresent) * kPage);
  }
  EXPECT_TRUE(test::eventually([&] { return source_counter(SourceCounter::kConnections) == 0; }))
      << "a finished target closes its connections";
}

TEST_P(PagerTransport, ASourceThatComesBackWithNewKeysIsReconnected) {
  PagerHarness vm(PagerHarness::Specs{{512}});
  listen();
  open_source(vm, 1);
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  auto first = vm.touch(0, 100);
  ASSERT_TRUE(PagerHarness::arrives(first));
  source_.reset();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  auto waiting = vm.touch(0, 200);
  EXPECT_TRUE(PagerHarness::waits(waiting));
  open_source(vm, 2);
  ASSERT_TRUE(source_->scan().ok());
  ASSERT_TRUE(vm.session->connect(endpoints()).ok());
  ASSERT_TRUE(PagerHarness::arrives(waiting));
  EXPECT_EQ(waiting.get(), vm.expected(0, 200));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.counter(TargetCounter::kReconnectCount), 1u);
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST_P(PagerTransport, ASourceFileThatShrinksIsAnErrorAndNoSignal) {
  PagerHarness vm(PagerHarness::Specs{{256}});
  listen();
  open_source(vm, 1);
  vm.map_vm();
  vm.open();
  ASSERT_TRUE(vm.session->connect(endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  auto first = vm.touch(0, 3);
  ASSERT_TRUE(PagerHarness::arrives(first));
  ASSERT_EQ(::truncate(vm.regions[0].source_path.c_str(), 16 * kPage), 0);
  auto lost = vm.touch(0, 90);
  if (provider().pins_memory) {
    // The device still has the pages, and reads their old bytes.
    ASSERT_TRUE(PagerHarness::arrives(lost));
    EXPECT_EQ(lost.get(), vm.expected(0, 90));
    ASSERT_TRUE(source_->scan().ok());
    ASSERT_TRUE(test::eventually([&] { return source_->failure().has_value(); }));
    EXPECT_EQ(source_->failure()->code, ErrorCode::kRegionChanged);
    return;
  }
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  EXPECT_EQ(vm.session->failure()->code, ErrorCode::kRegionChanged);
  EXPECT_TRUE(PagerHarness::waits(lost));
  ASSERT_TRUE(source_->scan().ok());
  ASSERT_TRUE(test::eventually([&] { return source_->failure().has_value(); }));
  EXPECT_EQ(source_->failure()->code, ErrorCode::kRegionChanged);
  // Restores the file's length and bytes, so that the vCPU of this test ends.
  vm.session.reset();
  for (uint64_t page = 16; page < 256; ++page) {
    test::write_pattern(vm.regions[0].source_fd.get(), vm.regions[0].seed, page);
  }
  source_.reset();
  open_source(vm, 3);
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(PagerHarness::arrives(lost));
  EXPECT_EQ(lost.get(), vm.expected(0, 90));
}

std::vector<Wire> all_wires() {
  std::vector<Wire> wires;
  for (const bool faulty : {false, true})
    for (const Provider* provider : transport::tested_providers()) wires.push_back({provider, faulty});
  return wires;
}

INSTANTIATE_TEST_SUITE_P(Wires, PagerTransport, ::testing::ValuesIn(all_wires()), [](const auto& tested) {
  return std::string(tested.param.provider->name) + (tested.param.faulty ? "Faulty" : "");
});

}  // namespace
}  // namespace vmigrate::pager
