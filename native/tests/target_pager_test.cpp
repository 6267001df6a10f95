#include "pager/target.hpp"

#include <gtest/gtest.h>
#include <sys/mount.h>

#include <random>

#include "pager/fault_stats.hpp"
#include "pager/wait_table.hpp"
#include "tests/pager_harness.hpp"

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
  EXPECT_GT(vm.counter(TargetCounter::kFaultP50Ns), 0u);
  EXPECT_GE(vm.counter(TargetCounter::kFaultMaxNs), vm.counter(TargetCounter::kFaultP99Ns));
  vm.finish_maps();
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
  // The second region is known as two ranges.
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
  ASSERT_TRUE(test::eventually([&] { return vm.demand->waiting_count() == kDemandFetchesMax; }));
  EXPECT_EQ(vm.counter(TargetCounter::kFaultCount), kDemandFetchesMax);
  vm.demand->release_all();
  for (uint64_t page = 0; page < kVcpus; ++page) {
    ASSERT_TRUE(PagerHarness::arrives(readings[page])) << page;
    EXPECT_EQ(readings[page].get(), vm.expected(0, page));
  }
}

TEST(TargetPager, BandwidthLimitHoldsPrefetchAndNotDemand) {
  PagerHarness vm(PagerHarness::Specs{{2048}});
  vm.start(true, {.bandwidth_bytes_per_s = 16 << 20, .prefetch_bytes_max = 64 << 10});
  const auto begun = std::chrono::steady_clock::now();
  auto reading = vm.touch(0, 2047);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  const auto took = std::chrono::steady_clock::now() - begun;
  EXPECT_GT(took, 400ms) << "8 MiB at 16 MiB/s";
  EXPECT_EQ(vm.bad_pages(), 0u);
}

struct Refusal {
  transport::OpResult result;
  ErrorCode code;
};
class TargetPagerRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(TargetPagerRefusal, FailsTheSessionAndNeverZeroFills) {
  PagerHarness vm(PagerHarness::Specs{{8}});
  vm.start(false);
  vm.demand->fail_with(GetParam().result);
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  ASSERT_TRUE(vm.session->failure());
  EXPECT_EQ(vm.session->failure()->code, GetParam().code);
  EXPECT_GT(vm.edges, 0);
  EXPECT_TRUE(PagerHarness::waits(reading)) << "the vCPU must wait, not read zeros";
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kFailed);
  EXPECT_TRUE(PagerHarness::waits(reading));
  // A later session takes over and the vCPU reads its page.
  vm.finish_maps();
  vm.open(true);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 3));
}

INSTANTIATE_TEST_SUITE_P(Results, TargetPagerRefusal,
                         ::testing::Values(Refusal{transport::OpResult::kBadKey, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kOutOfRange, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kNotAllowed, ErrorCode::kProtocol},
                                           Refusal{transport::OpResult::kIoError, ErrorCode::kRegionChanged},
                                           Refusal{transport::OpResult::kNoSpace, ErrorCode::kNoSpace}));

class TargetPagerBadMap : public ::testing::TestWithParam<int> {};

TEST_P(TargetPagerBadMap, AnImpossibleDataMapFailsTheSession) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  SourceEndpoints endpoints = vm.endpoints();
  // A map of the peer's making.
  wire::DataMapHeader header{};
  header.magic = wire::kDataMapMagic;
  header.ready = 1;
  header.page_count = 16;
  header.data_page_count = 16;
  switch (GetParam()) {
    case 0:
      header.magic ^= 1;
      break;
    case 1:
      header.page_count = 17;
      break;
    case 2:
      header.ready = 2;
      break;
    case 3:
      header.data_page_count = UINT64_MAX;
      break;
    default:
      header.data_page_count = 3;  // the bits say 16
  }
  const UniqueFd fd(::memfd_create("hostile-map", MFD_CLOEXEC));
  ASSERT_EQ(::pwrite(fd.get(), &header, sizeof(header), 0), static_cast<ssize_t>(sizeof(header)));
  ASSERT_EQ(::pwrite(fd.get(), "\xff\xff", 2, sizeof(header)), 2);
  endpoints.keys[0].data_map = vm.source.expose(fd.get(), sizeof(header) + 2);
  ASSERT_TRUE(vm.session->connect(std::move(endpoints)).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kFailed));
  EXPECT_EQ(vm.session->failure()->code, ErrorCode::kProtocol);
}
INSTANTIATE_TEST_SUITE_P(Lies, TargetPagerBadMap, ::testing::Range(0, 5));

TEST(TargetPager, AFullFileSystemAtTheTargetIsNoSpace) {
  test::TempDir mount_point;
  if (::mount("tmpfs", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mount: not permitted here";
  }
  {
    PagerHarness vm(PagerHarness::Specs{{256}}, mount_point.path());
    // Somebody else takes most of the room after the region was made.
    const std::string hog = mount_point / "hog";
    const int fd = ::open(hog.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_EQ(::posix_fallocate(fd, 0, 512 << 10), 0);
    ::close(fd);
    vm.start();
    ASSERT_TRUE(vm.reaches(TargetState::kFailed));
    EXPECT_EQ(vm.session->failure()->code, ErrorCode::kNoSpace);
    auto reading = vm.touch(0, 255);
    EXPECT_TRUE(PagerHarness::waits(reading));
    // Room again: a later session goes on from what is here.
    ASSERT_EQ(::unlink(hog.c_str()), 0);
    vm.session->close();
    vm.open(true);
    EXPECT_GT(vm.counter(TargetCounter::kPagesPresent), 0u);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(vm.reaches(TargetState::kComplete));
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(vm.bad_pages(), 0u);
  }
  ::umount(mount_point.path().c_str());
}

TEST(TargetPager, ZeroPagesAtAFullTargetAreNoSpaceToo) {
  test::TempDir mount_point;
  if (::mount("tmpfs", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mount: not permitted here";
  }
  {
    PagerHarness vm(PagerHarness::Specs{{128, [](uint64_t) { return false; }}, {2}}, mount_point.path());
    const std::string hog = mount_point / "hog";
    const int fd = ::open(hog.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    vm.map_vm();
    vm.finish_maps();
    vm.open();
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    // The second region keeps the session from finishing.
    const uint64_t held_key = 102;
    vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.key == held_key; });
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 128; }));
    uint64_t taken = 0;
    while (::posix_fallocate(fd, static_cast<off_t>(taken), kPage) == 0) taken += kPage;
    ::close(fd);
    auto reading = vm.touch(0, 64);
    ASSERT_TRUE(vm.reaches(TargetState::kFailed));
    EXPECT_EQ(vm.session->failure()->code, ErrorCode::kNoSpace);
    EXPECT_TRUE(PagerHarness::waits(reading));
    ::unlink(hog.c_str());
    vm.bulk->release_all();
    vm.session->close();
    vm.open(true);
    ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
    ASSERT_TRUE(vm.session->start().ok());
    ASSERT_TRUE(PagerHarness::arrives(reading));
    EXPECT_EQ(reading.get(), 0u);
  }
  ::umount(mount_point.path().c_str());
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
  // Huge pages reserved for the length of this test.
  const char* knob = "/proc/sys/vm/nr_hugepages";
  const auto read_knob = [&] {
    char text[32] = {};
    const UniqueFd fd(::open(knob, O_RDONLY | O_CLOEXEC));
    (void)!::read(fd.get(), text, sizeof(text) - 1);
    return std::strtoull(text, nullptr, 10);
  };
  const auto write_knob = [&](unsigned long long value) {
    const std::string text = std::to_string(value);
    const UniqueFd fd(::open(knob, O_WRONLY | O_CLOEXEC));
    (void)!::write(fd.get(), text.data(), text.size());
  };
  const auto before = read_knob();
  write_knob(before + 4);
  test::TempDir mount_point;
  const bool mounted = read_knob() >= before + 4 &&
                       ::mount("hugetlbfs", mount_point.path().c_str(), "hugetlbfs", 0, "pagesize=2M") == 0;
  if (mounted) {
    PagerHarness vm(PagerHarness::Specs{{4, [](uint64_t page) { return page / 512 < 2; }, big}},
                    mount_point.path());
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
  if (mounted) ::umount(mount_point.path().c_str());
  write_knob(before);
  if (!mounted) GTEST_SKIP() << "no huge pages can be reserved here";
}

TEST(FaultStats, PercentilesAreWithinASixteenth) {
  FaultStats stats;
  stats.start(0);
  for (uint64_t wait = 1; wait <= 1000; ++wait) stats.record(0, wait * 1000);
  EXPECT_NEAR(static_cast<double>(stats.percentile_ns(500)), 500e3, 500e3 / 16);
  EXPECT_NEAR(static_cast<double>(stats.percentile_ns(990)), 990e3, 990e3 / 16);
  EXPECT_EQ(stats.max_ns(), 1'000'000u);
  EXPECT_EQ(stats.wait_ns(), 500'500'000u);
  FaultStats huge;
  huge.record(0, UINT64_MAX);
  EXPECT_EQ(huge.percentile_ns(500), UINT64_MAX);
  EXPECT_EQ(FaultStats().percentile_ns(500), 0u);
}

TEST(FaultStats, DegradedTimeEndsWithTheLastWindowThatWaitedMoreThanATenth) {
  constexpr uint64_t kMs = 1'000'000;
  FaultStats stats;
  stats.start(1000 * kMs);
  const auto wait = [&](uint64_t from_ms, uint64_t to_ms) {
    stats.record((1000 + from_ms) * kMs, (1000 + to_ms) * kMs);
  };
  wait(3, 4);
  EXPECT_EQ(stats.degraded_ns(), 0u) << "exactly a tenth is not more";
  wait(5, 6);
  EXPECT_EQ(stats.degraded_ns(), 10 * kMs) << "two waits of one window add up";
  wait(47, 50);
  EXPECT_EQ(stats.degraded_ns(), 50 * kMs);
  wait(105, 135);
  EXPECT_EQ(stats.degraded_ns(), 140 * kMs);
  wait(20, 29);
  EXPECT_EQ(stats.degraded_ns(), 140 * kMs) << "a straggler of an older window";
  wait(200, 3000);
  EXPECT_EQ(stats.degraded_ns(), 3000 * kMs);
}

TEST(WaitTable, EachWaitIsResolvedOnceAndOnlyInItsRange) {
  WaitTable waits;
  for (uint64_t page = 0; page < kWaitingFaultsMax; ++page) {
    ASSERT_TRUE(waits.insert(page_key(1, PageIndex{page}), page + 1));
  }
  EXPECT_FALSE(waits.insert(page_key(1, PageIndex{999}), 1)) << "full";
  EXPECT_EQ(waits.find(page_key(0, PageIndex{0}), page_key(1, PageIndex{0})), 0u);
  EXPECT_NE(waits.find(page_key(1, PageIndex{10}), page_key(1, PageIndex{11})), 0u);
  std::atomic<uint64_t> sum{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (uint64_t page = 0; page < kWaitingFaultsMax; ++page) {
        const PageKey key = page_key(1, PageIndex{page});
        waits.resolve(key, key + 1, [&](uint64_t read_ns) { sum += read_ns; });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(sum, kWaitingFaultsMax * (kWaitingFaultsMax + 1) / 2);
  EXPECT_EQ(waits.count(), 0u);
}

}  // namespace
}  // namespace vmigrate::pager
