// Tests an image that is read from a holder whose pages, or holes, are not what the root took.

#include <gtest/gtest.h>

#include <random>

#include "tests/image/fetch_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::all_but_each_fourth;
using test::arrives;
using test::eventually;
using test::FetchHarness;
using test::Gates;
using test::kPage;
using test::waits;
using transport::Operation;
using wire::ImageCounter;
using wire::InjectPoint;

constexpr uint64_t kDamagedPages = 512, kAllowed = 64;

bool is_of_pages(const Operation& op) {
  return static_cast<uint32_t>(op.local) == 0;
}

/// The next reads of the page, so many, over this connection bring it damaged; those after them as it is.
void damage_reads(FetchHarness& host, test::FakeControl& control, uint64_t page, uint64_t count) {
  const std::lock_guard lock(control.mutex);
  control.result = [&host, page, left = count, before = control.result](const Operation& op) mutable {
    const bool has_page = is_of_pages(op) && op.local_offset_bytes <= page * kPage &&
                          page * kPage < op.local_offset_bytes + op.length_bytes;
    if (has_page) {
      host.serve_damaged(page, left != 0);
      if (left != 0) --left;
    }
    return before(op);
  };
}

class Damaged : public ::testing::Test {
 protected:
  /// A session that reads what clones ask for, and its digests, of which none is known.
  void start() {
    host.finish_maps();
    host.use_digests();
    host.start();
  }
  uint64_t refused() const { return host.counter(ImageCounter::kRefusedPages); }
  std::optional<PageIndex> check(uint64_t first, uint64_t count) {
    const auto checked = host.fetch->check(0, {PageIndex{first}, count});
    EXPECT_TRUE(checked.ok()) << (checked.ok() ? "" : checked.error().what);
    return checked.ok() ? checked.value() : std::nullopt;
  }
  bool fails_damaged() {
    return host.reaches(ImageState::kFailed) && host.fetch->failure()->code == ErrorCode::kDamaged;
  }
  FetchHarness host{FetchHarness::Specs{{kDamagedPages, all_but_each_fourth}}};
};

TEST_F(Damaged, APageThatACloneWaitsForIsAskedForUntilItIsRight) {
  start();
  host.know_all();
  damage_reads(host, *host.demand, 9, 3);
  auto& clone = host.add_clone();
  auto reading = clone.read(9);
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(clone.word(0, 9)[511], test::pattern_word(1, 9, 511));
  EXPECT_EQ(refused(), 3u);
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 4 * kPage);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(clone), 0u);
  EXPECT_EQ(check(0, kDamagedPages), std::nullopt);
}

/// At the begin, in the middle and at the end of runs.
TEST_F(Damaged, BulkPublishesTheGoodPagesOfARunAndReadsTheOthersAgain) {
  start();
  host.know_all();
  for (const uint64_t page : {0, 1, 9, 10, 50, 126, 128, 510}) damage_reads(host, *host.bulk, page, 2);
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(refused(), 16u);
  EXPECT_EQ(host.bad_pages(host.add_clone()), 0u);
  EXPECT_EQ(host.counter(ImageCounter::kPagesCopied) + host.counter(ImageCounter::kPagesZero), kDamagedPages);
  EXPECT_EQ(host.counter(ImageCounter::kCopiedBytes),
            (host.counter(ImageCounter::kPagesCopied) + refused()) * kPage);
}

/// A clone waits for a page that bulk has read, and that is refused: the last of its run, so that no page
/// after it wakes the clone.
TEST_F(Damaged, AWaitForAPageThatBulkRefusesIsServed) {
  start();
  host.know_all();
  auto& clone = host.add_clone();
  host.bulk->hold_if([](const Operation& op) { return is_of_pages(op); });
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(eventually([&] { return host.bulk->held_count() != 0; }));
  auto reading = clone.read(2);
  EXPECT_TRUE(waits(reading));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), 0u);
  damage_reads(host, *host.bulk, 2, 1);
  damage_reads(host, *host.demand, 2, 0);
  // Only the first run: the end of the image would wake everybody.
  host.bulk->hold_if([](const Operation& op) { return is_of_pages(op) && op.local_offset_bytes != 0; });
  {
    const std::lock_guard lock(host.bulk->mutex);
    host.bulk->kick();
  }
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(2));
  EXPECT_EQ(refused(), 1u);
  host.bulk->release_all();
}

/// The sweep has passed the page, and nobody waits for it any more.
TEST_F(Damaged, TheSweepReadsAPageThatDemandHasRefused) {
  start();
  host.know_all();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  auto reading = clone.read(5);
  ASSERT_TRUE(eventually([&] { return host.demand->held_count() == 1; }));
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(eventually([&] {
    return host.counter(ImageCounter::kPagesCopied) + host.counter(ImageCounter::kPagesZero) ==
           kDamagedPages - 1;
  }));
  host.fetch->remove_clone(clone.memory);
  damage_reads(host, *host.demand, 5, 1);
  damage_reads(host, *host.bulk, 5, 0);
  host.demand->release_all();
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(refused(), 1u);
  EXPECT_EQ(check(0, kDamagedPages), std::nullopt);
  ASSERT_TRUE(release_vm(clone.memory).ok());
  ASSERT_TRUE(arrives(reading));
  EXPECT_EQ(reading.get(), host.expected(5));
}

TEST_F(Damaged, AHolderThatIsNeverRightFailsTheImageSoon) {
  for (const bool is_swept : {false, true}) {
    FetchHarness one(FetchHarness::Specs{{64}});
    one.finish_maps();
    one.use_digests();
    one.serve_damaged(8, true);
    one.start();
    one.know_all();
    auto& clone = one.add_clone();
    std::future<uint64_t> reading;
    if (is_swept) {
      ASSERT_TRUE(one.fetch->sweep().ok());
    } else {
      reading = clone.read(8);
    }
    ASSERT_TRUE(one.reaches(ImageState::kFailed));
    EXPECT_EQ(one.fetch->failure()->code, ErrorCode::kDamaged);
    EXPECT_EQ(one.counter(ImageCounter::kRefusedPages), kAllowed + 1);
    EXPECT_LE(one.demand->posted_count, kAllowed + 1);
    EXPECT_TRUE(test::image_threads_end());
    if (!reading.valid()) continue;
    EXPECT_TRUE(waits(reading));
    one.fetch->remove_clone(clone.memory);
    ASSERT_TRUE(release_vm(clone.memory).ok());
    ASSERT_TRUE(arrives(reading));
  }
}

TEST_F(Damaged, SoManyAsAreAllowedMayBeRefused) {
  start();
  host.know_all();
  damage_reads(host, *host.demand, 8, kAllowed);
  auto& clone = host.add_clone();
  EXPECT_EQ(clone.read(8).get(), host.expected(8));
  EXPECT_EQ(refused(), kAllowed);
  EXPECT_EQ(host.fetch->state(), ImageState::kCopying);
}

TEST_F(Damaged, APageThatWasReadBeforeItsDigestWasKnownIsFoundByACheck) {
  start();
  damage_reads(host, *host.demand, 9, 1);
  auto& clone = host.add_clone();
  EXPECT_EQ(clone.read(8).get(), host.expected(8));
  EXPECT_EQ(clone.read(9).get(), host.expected(9));
  EXPECT_NE(clone.word(0, 9)[511], test::pattern_word(1, 9, 511));
  EXPECT_EQ(host.fetch->check(0, {PageIndex{0}, 1}).error().code, ErrorCode::kInvalidArgument);
  host.know(100);
  EXPECT_EQ(host.fetch->check(0, {PageIndex{0}, 101}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(check(0, 9), std::nullopt);
  EXPECT_EQ(check(10, 90), std::nullopt);
  EXPECT_EQ(check(100, 0), std::nullopt);
  EXPECT_EQ(check(0, 100), PageIndex{9});
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  host.know_all();
  EXPECT_EQ(check(9, kDamagedPages - 9), PageIndex{9});
  EXPECT_EQ(host.fetch->check(1, {PageIndex{0}, 0}).error().code, ErrorCode::kInvalidArgument);
  host.fetch->close();
  EXPECT_EQ(host.fetch->check(0, {PageIndex{0}, 1}).error().code, ErrorCode::kClosed);
}

TEST_F(Damaged, ACheckOfASessionWithoutDigestsIsRefused) {
  host.finish_maps();
  host.start();
  EXPECT_EQ(host.fetch->check(0, {PageIndex{0}, 0}).error().code, ErrorCode::kInvalidArgument);
}

/// The holder says that pages 8 and 9 are holes.
TEST_F(Damaged, DataThatAHolderCallsAHoleIsReadWhenItsDigestIsKnown) {
  host.data[0][8] = host.data[0][9] = false;
  host.finish_maps();
  host.data[0][8] = host.data[0][9] = true;
  host.use_digests();
  host.know(9);  // of page 8, and not of page 9
  host.start();
  ASSERT_TRUE(eventually([&] { return host.counter(ImageCounter::kPagesZero) == kDamagedPages / 4 + 1; }));
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  auto& clone = host.add_clone();
  EXPECT_EQ(host.bad_pages(clone), 1u);
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  host.know_all();
  EXPECT_EQ(check(0, kDamagedPages), PageIndex{9});
  EXPECT_EQ(check(10, kDamagedPages - 10), std::nullopt);
}

/// F15 and F16: the digest comes between the look at it and the publishing.
TEST_F(Damaged, APageWhoseDigestComesWhileItIsPublishedFailsTheImage) {
  for (const bool is_swept : {false, true}) {
    FetchHarness one(FetchHarness::Specs{{64}});
    Gates gates;
    one.finish_maps();
    one.use_digests();
    one.serve_damaged(8, true);
    one.start();
    auto& published = gates.close(InjectPoint::kImagePublished);
    auto& clone = one.add_clone();
    std::future<uint64_t> reading;
    if (is_swept) {
      ASSERT_TRUE(one.fetch->sweep().ok());
    } else {
      reading = clone.read(8);
    }
    ASSERT_TRUE(gates.wait_parked(published));
    one.know_all();
    const uint64_t counted = one.counter(ImageCounter::kPagesCopied);
    gates.open(published);
    ASSERT_TRUE(one.reaches(ImageState::kFailed));
    EXPECT_EQ(one.fetch->failure()->code, ErrorCode::kDamaged);
    EXPECT_EQ(one.counter(ImageCounter::kPagesCopied), counted) << "no image is complete before the look";
    // The other side of the pair sees the page as well.
    EXPECT_EQ(one.fetch->check(0, {PageIndex{0}, 64}).value(), PageIndex{8});
    EXPECT_TRUE(test::image_threads_end());
    one.fetch->remove_clone(clone.memory);
    ASSERT_TRUE(release_vm(clone.memory).ok());
  }
}

/// Digests come in pieces, each followed by a check, while pages come over both lanes, some of them damaged.
/// Whatever the timing, a damaged page that stays is found.
TEST_F(Damaged, EveryPageIsLookedAtWhenDigestsComeWhileItFills) {
  std::minstd_rand random(7);
  uint64_t found_late = 0, refused_early = 0, failed = 0;
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(round);
    FetchHarness one(FetchHarness::Specs{{kDamagedPages, all_but_each_fourth}});
    one.finish_maps();
    one.use_digests();
    const uint64_t damaged = random() % kDamagedPages / 4 * 4;
    one.open();
    auto& clone = one.add_clone();
    ASSERT_TRUE(one.fetch->connect(one.endpoints()).ok());
    damage_reads(one, *one.bulk, damaged, 1);
    ASSERT_TRUE(one.fetch->start().ok());
    ASSERT_TRUE(one.fetch->sweep().ok());
    auto touching =
        std::async(std::launch::async, [&, page = random() % kDamagedPages] { return *clone.word(0, page); });
    std::optional<PageIndex> found;
    const uint64_t piece = 1 + random() % 64;
    for (uint64_t page = 0; page < kDamagedPages; page += piece) {
      const uint64_t end = std::min(kDamagedPages, page + piece);
      one.know(end);
      const auto checked = one.fetch->check(0, {PageIndex{page}, end - page});
      ASSERT_TRUE(checked.ok());
      if (checked.value()) found = checked.value();
    }
    ASSERT_TRUE(eventually([&] { return one.fetch->state() > ImageState::kDisconnected; }));
    failed += one.fetch->state() == ImageState::kFailed ? 1 : 0;
    refused_early += one.counter(ImageCounter::kRefusedPages);
    found_late += found ? 1 : 0;
    if (one.fetch->state() == ImageState::kComplete && !found) {
      EXPECT_EQ(one.bad_pages(clone), 0u);
    }
    if (found) {
      EXPECT_EQ(*found, PageIndex{damaged});
    }
    one.fetch->remove_clone(clone.memory);
    ASSERT_TRUE(release_vm(clone.memory).ok());
    (void)touching.get();
  }
  EXPECT_GE(found_late + refused_early + failed, 50u);
}

TEST_F(Damaged, ASuccessorFindsWhatItsPredecessorDidNotLookAt) {
  start();
  damage_reads(host, *host.demand, 9, 1);
  EXPECT_EQ(host.add_clone().read(9).get(), host.expected(9));
  host.fetch->close();
  host.fetch.reset();
  host.know_all();
  host.open(/*resume=*/true);
  EXPECT_EQ(check(0, kDamagedPages), PageIndex{9});
}

}  // namespace
}  // namespace vmigrate::pager
