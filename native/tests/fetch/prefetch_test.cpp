#include "fetch/prefetch.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "target/core.hpp"
#include "tests/fetch/units.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

TEST(Prefetch, AsksForNoMoreThanTheLinkCarries) {
  test::PagerHarness vm(test::PagerHarness::Specs{{64, [](uint64_t) { return true; }}});
  vm.map_vm();
  auto core = TargetCore::open(vm.memory, vm.configs(), {}, false, {});
  ASSERT_TRUE(core.ok()) << core.error().what;
  FetchCore& fetch = core.value()->fetch();
  const DataMapReader maps(fetch);
  ServiceRate rate;
  const Prefetch prefetch(fetch, maps, rate);
  const uint64_t fault_ns = 1'000 * kMs;
  const uint64_t quiet_ns = fault_ns + kQuietNs;
  fetch.last_fault_ns.store(fault_ns);

  // The rate of the link is not known yet.
  EXPECT_EQ(prefetch.in_flight_bytes_max(fault_ns), kInFlightBytesBusy);
  EXPECT_EQ(prefetch.in_flight_bytes_max(quiet_ns), kInFlightBytesQuiet);

  rate.begin(0);
  rate.note(kMib, 20 * kMs);
  EXPECT_EQ(prefetch.in_flight_bytes_max(fault_ns), 50 * kMib * (kInFlightNsBusy / kMs) / 1000);
  EXPECT_EQ(prefetch.in_flight_bytes_max(quiet_ns), 50 * kMib * (kInFlightNsQuiet / kMs) / 1000);

  // A lower limit for slow links, because with less the link would wait for requests. An upper limit for fast
  // links, because more was measured to be of no use.
  for (uint64_t at_ms = 20; at_ms < 20'000; at_ms += 500) rate.note(1, (at_ms + 500) * kMs);
  EXPECT_EQ(prefetch.in_flight_bytes_max(fault_ns), 4 * kChunkBytesMin);
  ServiceRate fast;
  fast.begin(0);
  fast.note(1024 * kMib, 20 * kMs);
  EXPECT_EQ(Prefetch(fetch, maps, fast).in_flight_bytes_max(fault_ns), kInFlightBytesBusy);
}

}  // namespace
}  // namespace vmigrate::pager
