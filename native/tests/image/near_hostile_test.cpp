// Tests near holders that lie, keep silent or break the protocol: each is given up, and the image is read
// from the root all the same. And a root that answers as only a near holder may.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "image/serve/clone_mapper.hpp"
#include "tests/image/near_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::eventually;
using test::FakeNear;
using test::FetchHarness;
using test::kPage;
using transport::Operation;
using transport::OpResult;
using wire::ImageCounter;
using wire::PageState;

constexpr uint64_t kHostilePages = 2048, kDataPages = kHostilePages / 4 * 3;

class NearHostile : public ::testing::Test {
 protected:
  void start() {
    host.finish_maps();
    host.start();
    ASSERT_TRUE(
        eventually([&] { return host.counter(ImageCounter::kPagesZero) == kHostilePages - kDataPages; }));
  }
  void start_with_digests() {
    host.use_digests();
    host.know_all();
    start();
  }
  /// The root's bytes with one bit flipped in each page.
  UniqueFd flipped() {
    UniqueFd file(::memfd_create("flipped", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(file.get(), static_cast<off_t>(host.lengths[0])), 0);
    for (uint64_t page = 0; page < kHostilePages; ++page) {
      test::write_pattern(file.get(), 1, page);
      const uint64_t word = test::pattern_word(1, page, 511) ^ 1;
      EXPECT_EQ(::pwrite(file.get(), &word, 8, static_cast<off_t>((page + 1) * kPage - 8)), 8);
    }
    return file;
  }
  void completes_right() {
    ASSERT_TRUE(host.fetch->sweep().ok());
    ASSERT_TRUE(host.reaches(ImageState::kComplete)) << host.fetch->failure()->what;
    EXPECT_EQ(host.bad_pages(host.add_clone()), 0u);
  }

  FetchHarness host{FetchHarness::Specs{{kHostilePages, [](uint64_t page) { return page % 4 != 3; }}}};
};

TEST_F(NearHostile, AStateThatDoesNotExist) {
  start();
  FakeNear bulk(host, 1), device(host, 2, 1, FakeNear::Kind::kDevice);
  for (FakeNear* near : {&bulk, &device}) near->have_all();
  bulk.set_raw(0, 4);
  bulk.set_raw(kHostilePages - 2, 255);
  device.set_raw(8, 77);
  ASSERT_TRUE(device.add().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  EXPECT_TRUE(device.is_dropped(ErrorCode::kProtocol));
  ASSERT_TRUE(bulk.add().ok());
  completes_right();
  EXPECT_TRUE(bulk.is_dropped(ErrorCode::kProtocol));
}

TEST_F(NearHostile, APageThatIsPresentAndAbsentAtOnce) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  near.page_result = OpResult::kAbsent;
  ASSERT_TRUE(near.add().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 8), host.expected(8)) << "to demand it may say so";
  completes_right();
  EXPECT_TRUE(near.is_dropped(ErrorCode::kProtocol));
  EXPECT_EQ(host.counter(ImageCounter::kNearBytes), 0u);
}

TEST_F(NearHostile, AbsentIsAllItSays) {
  start();
  FakeNear near(host, 1);
  near.page_result = OpResult::kAbsent;
  ASSERT_TRUE(near.add().ok());
  auto& clone = host.add_clone();
  for (uint64_t page = 0; page < 100; page += 4) EXPECT_EQ(*clone.word(0, page), host.expected(page));
  EXPECT_EQ(host.counter(ImageCounter::kAbsentAnswers), 25u);
  EXPECT_TRUE(near.snapshot().is_connected);
  completes_right();
}

TEST_F(NearHostile, StatesThatCannotBeRead) {
  start();
  auto& clone = host.add_clone();
  for (const OpResult result :
       {OpResult::kAbsent, OpResult::kBadKey, OpResult::kIoError, OpResult::kOutOfRange}) {
    FakeNear device(host, 1, 0, FakeNear::Kind::kDevice);
    device.have_all();
    device.look_result = result;
    ASSERT_TRUE(device.add().ok());
    const auto page = 4 * static_cast<uint64_t>(result);
    EXPECT_EQ(*clone.word(0, page), host.expected(page));
    EXPECT_TRUE(device.is_dropped(ErrorCode::kProtocol));
    host.fetch->remove_near(1);
  }
  FakeNear near(host, 1);
  near.have_all();
  near.look_result = OpResult::kAbsent;
  ASSERT_TRUE(near.add().ok());
  completes_right();
  EXPECT_TRUE(near.is_dropped(ErrorCode::kProtocol));
}

TEST_F(NearHostile, PagesThatCannotBeRead) {
  start();
  auto& clone = host.add_clone();
  for (const OpResult result : {OpResult::kBadKey, OpResult::kIoError, OpResult::kNotAllowed}) {
    FakeNear near(host, 1);
    near.have_all();
    near.page_result = result;
    ASSERT_TRUE(near.add().ok());
    const auto page = 4 * static_cast<uint64_t>(result);
    EXPECT_EQ(*clone.word(0, page), host.expected(page));
    EXPECT_TRUE(eventually([&] { return near.snapshot().failure.has_value(); }));
    host.fetch->remove_near(1);
  }
  FakeNear near(host, 1);
  near.have_all();
  near.page_result = OpResult::kIoError;
  ASSERT_TRUE(near.add().ok());
  completes_right();
  EXPECT_TRUE(near.snapshot().failure.has_value());
}

/// It is of this host, whoever has sent the page.
TEST_F(NearHostile, NoSpaceEndsTheSession) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  near.page_result = OpResult::kNoSpace;
  ASSERT_TRUE(near.add().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kFailed));
  EXPECT_EQ(host.fetch->failure()->code, ErrorCode::kNoSpace);
}

TEST_F(NearHostile, WrongPagesAreSeenByNobodyAndCostTheHolderItsPlace) {
  start_with_digests();
  const UniqueFd wrong = flipped();
  FakeNear near(host, 1);
  near.serve_file(wrong.get());
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  auto& clone = host.add_clone();
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  EXPECT_TRUE(near.is_dropped(ErrorCode::kDamaged));
  EXPECT_EQ(host.counter(ImageCounter::kRefusedPages), kNearRefusedPagesMax);
  completes_right();
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes) + host.counter(ImageCounter::kPrefetchBytes),
            kDataPages * kPage);
}

/// Many more wrong pages than a session forgives its root.
TEST_F(NearHostile, ManyBadHoldersDoNotUseUpTheRootsLimit) {
  start_with_digests();
  const UniqueFd wrong = flipped();
  ASSERT_TRUE(host.fetch->sweep().ok());
  for (uint32_t id = 0; id < 12; ++id) {
    if (id == 0) host.bulk->hold_all();
    FakeNear near(host, id);
    near.serve_file(wrong.get());
    near.have_all();
    ASSERT_TRUE(near.add().ok());
    if (host.fetch->state() == ImageState::kComplete) break;
    EXPECT_TRUE(near.is_dropped(ErrorCode::kDamaged)) << id;
    host.fetch->remove_near(id);
  }
  EXPECT_NE(host.fetch->state(), ImageState::kFailed);
  host.bulk->release_all();
  completes_right();
}

TEST_F(NearHostile, AGoodHolderBesideABadOneGoesOn) {
  start_with_digests();
  const UniqueFd wrong = flipped();
  FakeNear bad(host, 1), good(host, 2);
  bad.serve_file(wrong.get());
  for (FakeNear* near : {&bad, &good}) {
    near->have_all();
    ASSERT_TRUE(near->add().ok());
  }
  completes_right();
  EXPECT_TRUE(bad.is_dropped(ErrorCode::kDamaged));
  EXPECT_FALSE(good.snapshot().failure);
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes) + host.counter(ImageCounter::kPrefetchBytes), 0u);
}

/// What it has sent for a page that turns out to be absent there is overwritten by the root's bytes.
TEST_F(NearHostile, SilenceAfterSomePages) {
  start();
  FakeNear near(host, 1);
  near.have_all();
  ASSERT_TRUE(near.add().ok());
  std::atomic<int> answered{0};
  near.bulk->hold_if([&](const Operation& op) { return near.reads_pages(op) && ++answered > 3; });
  completes_right();
  EXPECT_TRUE(near.is_dropped(ErrorCode::kTimeout));
  EXPECT_GT(host.counter(ImageCounter::kPrefetchBytes), 0u);
}

TEST_F(NearHostile, ARootMayNotLackAPage) {
  host.finish_maps();
  host.start();
  host.demand->fail_with(OpResult::kAbsent);
  auto& clone = host.add_clone();
  auto reading = clone.read(8);
  ASSERT_TRUE(host.reaches(ImageState::kFailed));
  EXPECT_EQ(host.fetch->failure()->code, ErrorCode::kProtocol);
  EXPECT_TRUE(test::waits(reading)) << "it must not read zeros";
  EXPECT_TRUE(release_vm(clone.memory).ok());  // lets the test's thread go
  (void)reading.get();
}

TEST_F(NearHostile, NorMayItLackAPageThatIsPrefetchedOrItsDataMap) {
  for (const bool is_map : {false, true}) {
    FetchHarness other(FetchHarness::Specs{{kHostilePages}});
    other.finish_maps();
    other.open();
    auto endpoints = other.endpoints();
    const uint64_t ram_key = endpoints.keys[0].ram.key;
    other.bulk->result = [=](const Operation& op) {
      return (op.remote.key != ram_key) == is_map ? OpResult::kAbsent : OpResult::kOk;
    };
    ASSERT_TRUE(other.fetch->connect(std::move(endpoints)).ok());
    ASSERT_TRUE(other.fetch->start().ok());
    (void)other.fetch->sweep();  // may have failed already
    ASSERT_TRUE(other.reaches(ImageState::kFailed));
    EXPECT_EQ(other.fetch->failure()->code, ErrorCode::kProtocol);
  }
}

}  // namespace
}  // namespace vmigrate::pager
