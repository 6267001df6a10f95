#include "target/target.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <random>
#include <thread>

#include "target/limits.hpp"
#include "tests/support/huge_pages.hpp"
#include "tests/support/pager_harness.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::kPage;
using test::PagerHarness;
using wire::TargetCounter;

TEST(TargetPager, FillsDataAndLeavesHolesUnfetched) {
  PagerHarness vm(PagerHarness::Specs{{512, [](uint64_t page) { return page % 3 != 0; }}});
  vm.start();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_FALSE(vm.session->failure());
  EXPECT_EQ(vm.counter(TargetCounter::kPageCount), 512u);
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent), 341u);
  EXPECT_EQ(vm.counter(TargetCounter::kPagesZero), 171u);
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes), 341u * kPage);
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), 0u);
  EXPECT_GT(vm.counter(TargetCounter::kCompletedNs), 0u);
  EXPECT_GT(vm.counter(TargetCounter::kCpuNs), 0u);
  struct stat file {};
  ASSERT_EQ(::stat(vm.regions[0].target_path.c_str(), &file), 0);
  EXPECT_EQ(file.st_blocks, 341 * 8) << "holes take no memory";
  EXPECT_EQ(vm.bad_pages(), 0u);
  EXPECT_TRUE(vm.demand->was_destroyed()) << "a finished session holds no connection";
  EXPECT_TRUE(vm.bulk->was_destroyed());
}

TEST(TargetPager, ServesFaultsBeforeTheDataMapIsReady) {
  PagerHarness vm(PagerHarness::Specs{{64, [](uint64_t page) { return page < 32; }}});
  vm.start(false);
  for (const uint64_t page : {31, 0, 7, 40}) {
    auto reading = vm.touch(0, page, 5);
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), vm.expected(0, page, 5));
  }
  EXPECT_EQ(vm.counter(TargetCounter::kFaultCount), 4u);
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), 4 * kPage);
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes), 0u) << "nothing is swept before the holes are known";
  // A fault is counted as answered when its vCPU has been woken, and its page is counted after that.
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesPresent) == 4; }));
  EXPECT_GT(vm.counter(TargetCounter::kFaultP50Ns), 0u);
  EXPECT_GE(vm.counter(TargetCounter::kFaultMaxNs), vm.counter(TargetCounter::kFaultP99Ns));
  vm.finish_maps();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

// One READ may show the new `ready` beside the old count.
TEST(TargetPager, TheCountIsTakenFromAReadThatBeganAfterReady) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.map_vm();
  vm.open();
  SourceEndpoints endpoints = vm.endpoints();
  wire::DataMapHeader header{};
  header.magic = wire::kDataMapMagic;
  header.ready = 1;
  header.page_count = 16;
  const UniqueFd fd(::memfd_create("torn-map", MFD_CLOEXEC));
  ASSERT_EQ(::pwrite(fd.get(), &header, sizeof(header), 0), static_cast<ssize_t>(sizeof(header)));
  ASSERT_EQ(::pwrite(fd.get(), "\xff\xff", 2, sizeof(header)), 2);
  const auto map = vm.source.expose(fd.get(), sizeof(header) + 2);
  endpoints.keys[0].data_map = map;
  vm.bulk->hold_if([map](const transport::Operation& op) {
    return op.remote.key == map.key && op.length_bytes != wire::kDataMapHeaderBytes;
  });
  ASSERT_TRUE(vm.session->connect(std::move(endpoints)).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.bulk->held_count() == 1; }));
  header.data_page_count = 16;
  ASSERT_EQ(::pwrite(fd.get(), &header, sizeof(header), 0), static_cast<ssize_t>(sizeof(header)));
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(TargetPager, AFinishedVmFaultsWithoutUs) {
  PagerHarness vm(PagerHarness::Specs{{16, [](uint64_t page) { return page == 3; }}});
  vm.start();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kComplete);
  EXPECT_EQ(vm.bad_pages(), 0u);
  uffd::FaultEvent fault;
  EXPECT_EQ(uffd::read_faults(vm.memory.descriptors[0].fd.get(), {&fault, 1}).count, 0u);
}

TEST(TargetPager, SeveralRegionsAndRangesEachWithItsDescriptor) {
  PagerHarness vm(PagerHarness::Specs{{100, [](uint64_t page) { return page % 2 == 0; }}, {300}, {1}});
  vm.map_vm();
  // The VM maps the second region in two ranges.
  MappedRange& whole = vm.memory.ranges[1];
  MappedRange tail = whole;
  tail.region_offset_bytes = 130 * kPage;
  tail.length_bytes = whole.length_bytes - tail.region_offset_bytes;
  tail.base = whole.base + tail.region_offset_bytes;
  whole.length_bytes = tail.region_offset_bytes;
  vm.memory.ranges.push_back(tail);
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->start().ok());
  for (const auto& [region, page] :
       std::vector<std::pair<size_t, uint64_t>>{{0, 2}, {1, 131}, {1, 5}, {2, 0}}) {
    auto reading = vm.touch(region, page);
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), vm.expected(region, page));
  }
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(TargetPager, RefusesMemoryThatIsNotWhollyMapped) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.map_vm();
  const auto refused = [&] {
    const auto opened = TargetSession::open(vm.memory, vm.configs(), {}, false, [] {});
    return !opened.ok() && opened.error().code == ErrorCode::kInvalidArgument;
  };
  const MappedRange whole = vm.memory.ranges[0];
  EXPECT_FALSE(refused());
  vm.memory.ranges[0].length_bytes -= kPage;
  EXPECT_TRUE(refused());
  vm.memory.ranges[0].length_bytes = whole.length_bytes + kPage;
  EXPECT_TRUE(refused());
  vm.memory.ranges[0] = whole;
  vm.memory.ranges[0].region_index = 1;
  EXPECT_TRUE(refused());
  vm.memory.ranges[0] = whole;
  vm.memory.ranges[0].descriptor_index = 7;
  EXPECT_TRUE(refused());
  vm.memory.ranges[0] = whole;
  vm.memory.descriptors[0].kind = wire::PreloadDescriptor::kAsyncWp;
  EXPECT_TRUE(refused());
}

TEST(TargetPager, RefusesKeysThatCannotHoldTheRegion) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.map_vm();
  vm.open();
  const auto refused = [&](auto change) {
    SourceEndpoints endpoints = vm.endpoints();
    change(endpoints);
    const auto status = vm.session->connect(std::move(endpoints));
    return !status.ok() && status.error().code == ErrorCode::kProtocol;
  };
  EXPECT_TRUE(refused([](SourceEndpoints& e) { e.keys.clear(); }));
  EXPECT_TRUE(refused([](SourceEndpoints& e) { e.keys[0].ram.length_bytes -= 1; }));
  EXPECT_TRUE(refused([](SourceEndpoints& e) { e.keys[0].data_map.length_bytes = 64; }));
  EXPECT_FALSE(refused([](SourceEndpoints&) {}));
}

TEST(TargetPager, CallsOutOfOrderAreErrors) {
  PagerHarness vm(PagerHarness::Specs{{4}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  EXPECT_EQ(vm.session->start().error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(vm.session->connect({}).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  EXPECT_FALSE(vm.session->start().ok());
  EXPECT_FALSE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  vm.session->close();
  vm.session->close();
  EXPECT_FALSE(vm.session->start().ok());
}

TEST(TargetPager, PagesLargerThanATransferComeInPartsAndOutOfOrder) {
  const uint64_t big = 2 << 20;
  PagerHarness vm(PagerHarness::Specs{{3, [](uint64_t page) { return page / 512 != 1; }, big}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.demand->reverse = true;
  vm.bulk->hold_all();
  ASSERT_TRUE(vm.session->start().ok());
  // The data map's read is held too, so this page is fetched by demand, in two operations.
  auto reading = vm.touch(0, 1024 + 511, 9);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 1024 + 511, 9));
  EXPECT_EQ(vm.counter(TargetCounter::kDemandBytes), big);
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.counter(TargetCounter::kPagesZero), 1u);
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(TargetPager, ManyVcpusOverAFullTransportQueue) {
  PagerHarness vm(PagerHarness::Specs{{2048, [](uint64_t page) { return page % 7 != 0; }}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.demand->capacity = 2;
  vm.bulk->capacity = 1;
  vm.demand->reverse = vm.bulk->reverse = true;
  ASSERT_TRUE(vm.session->start().ok());
  std::vector<std::thread> vcpus;
  std::atomic<uint64_t> bad{0};
  for (uint32_t t = 0; t < 24; ++t) {
    vcpus.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 200; ++i) {
        const uint64_t page = random() % 2048;
        const auto* words = reinterpret_cast<const volatile uint64_t*>(vm.regions[0].base + page * kPage);
        if (words[i] != vm.expected(0, page, static_cast<uint64_t>(i))) ++bad;
      }
    });
  }
  for (auto& vcpu : vcpus) vcpu.join();
  EXPECT_EQ(bad, 0u);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent) + vm.counter(TargetCounter::kPagesZero), 2048u);
}

TEST(TargetPager, MoreFaultsThanTheTablesHoldWaitInTheKernel) {
  constexpr uint64_t kVcpus = 90;  // more than kDemandFetchesMax
  PagerHarness vm(PagerHarness::Specs{{128}});
  vm.start(false);
  vm.demand->hold_all();
  std::vector<std::future<uint64_t>> readings;
  for (uint64_t page = 0; page < kVcpus; ++page) readings.push_back(vm.touch(0, page));
  ASSERT_TRUE(test::eventually([&] { return vm.demand->held_count() == kDemandFetchesMax; }));
  EXPECT_EQ(vm.counter(TargetCounter::kFaultCount), kDemandFetchesMax);
  vm.demand->release_all();
  for (uint64_t page = 0; page < kVcpus; ++page) {
    ASSERT_TRUE(PagerHarness::arrives(readings[page])) << page;
    EXPECT_EQ(readings[page].get(), vm.expected(0, page));
  }
}

TEST(TargetPager, BandwidthLimitHoldsPrefetchAndNotDemand) {
  PagerHarness vm(PagerHarness::Specs{{2048}});
  const auto begun = std::chrono::steady_clock::now();
  vm.start(true, {{.bandwidth_bytes_per_s = 16 << 20, .prefetch_bytes_max = 64 << 10}});
  auto reading = vm.touch(0, 2047);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  const auto took = std::chrono::steady_clock::now() - begun;
  EXPECT_GT(took, 400ms) << "8 MiB at 16 MiB/s";
  EXPECT_EQ(vm.bad_pages(), 0u);
}

// Registering memory with an RDMA device allocates a page behind every byte of the file. Faults are then
// minor faults, and there is no hole to which zeros could be mapped.
TEST(TargetPager, AFileWithoutHolesIsFilledLikeOneThatHasNothingElse) {
  PagerHarness vm(PagerHarness::Specs{{512, [](uint64_t page) { return page >= 256; }}, {1}});
  for (const test::VmRegion& region : vm.regions) {
    const UniqueFd fd(::open(region.target_path.c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_EQ(::posix_fallocate(fd.get(), 0, static_cast<off_t>(region.length_bytes())), 0);
  }
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.length_bytes == kPage; });
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 256; }));
  const uint64_t before = vm.counter(TargetCounter::kFaultCount);
  for (const uint64_t page : {0, 15}) {
    auto reading = vm.touch(0, page);
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), 0u);
  }
  EXPECT_EQ(vm.counter(TargetCounter::kFaultCount), before + 1) << "neighbours are mapped along";
  vm.bulk->release_all();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(TargetPager, ASessionTakenOverWithEveryPageHereNeedsNoSource) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.start();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  vm.session.reset();
  vm.open(true);
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.counter(TargetCounter::kPagesPresent), 16u);
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(TargetPager, HugePagesOfHugetlbfs) {
  const uint64_t big = 2 << 20;
  const test::HugePages pages(4);
  if (!pages.is_mounted()) GTEST_SKIP() << "needs huge-pages: none can be reserved here";
  PagerHarness vm(PagerHarness::Specs{{4, [](uint64_t page) { return page / 512 < 2; }, big}}, pages.path());
  vm.start(false);
  // pwrite is refused on hugetlbfs: these endpoints copy through the mapping.
  auto data = vm.touch(0, 600, 3);
  ASSERT_TRUE(PagerHarness::arrives(data));
  EXPECT_EQ(data.get(), vm.expected(0, 600, 3));
  vm.finish_maps();
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 2; }));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
}

}  // namespace
}  // namespace vmigrate::pager
