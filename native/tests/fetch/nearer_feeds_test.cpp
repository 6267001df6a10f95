#include "fetch/nearer_feeds.hpp"

#include <gtest/gtest.h>

#include "fetch/bandwidth.hpp"
#include "tests/fetch/units.hpp"

namespace vmigrate::pager {
namespace {

using Feed = NearerFeeds::Feed;

constexpr uint64_t kStart = 5'000'000'000;

TEST(NearerFeeds, HoldTheRootsSweepBackUntilTheyAreSilentOrClosed) {
  NearerFeeds feeds;
  EXPECT_EQ(feeds.holds_back_until_ns(kStart), 0u);
  feeds.open(kStart);
  EXPECT_EQ(feeds.holds_back_until_ns(kStart), kStart + kNearerSilentNs);
  EXPECT_EQ(feeds.holds_back_until_ns(kStart + kNearerSilentNs), 0u) << "silent";
  feeds.note_page(kStart + 500 * kMs);
  EXPECT_EQ(feeds.holds_back_until_ns(kStart + kNearerSilentNs), kStart + 500 * kMs + kNearerSilentNs);
  feeds.close();
  EXPECT_EQ(feeds.holds_back_until_ns(kStart + 500 * kMs), 0u);
}

TEST(NearerFeeds, EitherIsEnough) {
  NearerFeeds feeds;
  feeds.open(kStart);
  feeds.open(kStart, Feed::kNearHolders);
  feeds.close();
  feeds.note_page(kStart + 1, Feed::kNearHolders);
  EXPECT_EQ(feeds.holds_back_until_ns(kStart), kStart + 1 + kNearerSilentNs);
  feeds.close(Feed::kNearHolders);
  EXPECT_EQ(feeds.holds_back_until_ns(kStart), 0u);
}

TEST(NearerFeeds, NearHoldersWaitForAMulticastOnly) {
  NearerFeeds feeds;
  feeds.open(kStart, Feed::kNearHolders);
  EXPECT_EQ(feeds.multicast_until_ns(kStart), 0u);
  feeds.open(kStart);
  feeds.note_page(kStart + 10 * kMs, Feed::kNearHolders);
  EXPECT_EQ(feeds.multicast_until_ns(kStart), kStart + kNearerSilentNs);
  EXPECT_EQ(feeds.multicast_until_ns(kStart + kNearerSilentNs), 0u);
  feeds.close();
  EXPECT_EQ(feeds.multicast_until_ns(kStart), 0u);
}

TEST(Bandwidth, CountsWhatAllTakeTogether) {
  Bandwidth none(0), limit(1 << 20);
  none.take(kStart, 1 << 30);
  EXPECT_EQ(none.due_ns(), 0u);
  limit.take(kStart, 512 << 10);
  EXPECT_EQ(limit.due_ns(), kStart + 490 * kMs) << "half a second, less the burst";
  limit.take(kStart, 512 << 10);
  EXPECT_EQ(limit.due_ns(), kStart + 990 * kMs);
}

}  // namespace
}  // namespace vmigrate::pager
