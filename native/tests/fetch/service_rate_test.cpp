#include "fetch/service_rate.hpp"

#include <gtest/gtest.h>

#include "tests/fetch/units.hpp"

namespace vmigrate::pager {
namespace {

TEST(ServiceRate, IsUnboundedUntilSomethingIsKnown) {
  ServiceRate rate;
  EXPECT_EQ(rate.bytes_within(kMs), UINT64_MAX);
  rate.begin(100 * kMs);
  rate.note(kMib, 101 * kMs);
  EXPECT_EQ(rate.bytes_within(kMs), UINT64_MAX) << "one transfer says little";
}

TEST(ServiceRate, CountsOnlyTheTimeInWhichSomethingWasUnderWay) {
  ServiceRate rate;
  uint64_t at_ns = 0;
  // 1 MiB in 10 ms, then a second without requests: a bandwidth limit does not make the link look slow.
  for (int i = 0; i < 5; ++i) {
    rate.begin(at_ns);
    rate.note(kMib / 2, at_ns + 4 * kMs);
    rate.note(kMib / 2, at_ns + 10 * kMs);
    at_ns += 1000 * kMs;
  }
  EXPECT_EQ(rate.bytes_within(1000 * kMs), 100 * kMib);
  EXPECT_EQ(rate.bytes_within(kMs), 100 * kMib / 1000);
}

TEST(ServiceRate, FollowsALinkThatChanges) {
  ServiceRate rate;
  rate.begin(0);
  uint64_t at_ns = 0;
  for (int i = 0; i < 100; ++i) rate.note(kMib, at_ns += 10 * kMs);
  EXPECT_EQ(rate.bytes_within(1000 * kMs), 100 * kMib);
  // One long stall does not make the link look slow.
  rate.note(kMib, at_ns += 2000 * kMs);
  EXPECT_GT(rate.bytes_within(1000 * kMs), 70 * kMib);
  for (int i = 0; i < 30; ++i) rate.note(kMib, at_ns += 100 * kMs);
  EXPECT_LT(rate.bytes_within(1000 * kMs), 11 * kMib);
  EXPECT_GE(rate.bytes_within(1000 * kMs), 10 * kMib);
}

}  // namespace
}  // namespace vmigrate::pager
