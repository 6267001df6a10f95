// Tests the gate through which pages of another holder become present, without the threads of a fetch.

#include "image/holder/page_gate.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "image/serve/wait_list.hpp"
#include "tests/image/fetch_harness.hpp"

namespace vmigrate::pager {
namespace {

using test::FetchHarness;
using test::kPage;
using wire::PageState;

constexpr uint64_t kGatePages = 512;

class PageGateTest : public ::testing::Test, private FetchOwner {
 protected:
  PageGateTest() {
    host.use_digests();
    auto opened =
        ImageCore::open(std::vector<TargetRegionConfig>{{host.image_paths[0], host.presence_paths[0],
                                                         host.lengths[0], kPage}},
                        false, {});
    EXPECT_TRUE(opened.ok());
    core = std::move(opened).value();
    fetch.emplace(core->fill(), options, core->serve_wake, static_cast<FetchOwner&>(*this));
    gate.emplace(*core, *fetch, host.digests.get(), true);
    EXPECT_TRUE(gate->open().ok());
    image.reset(::open(host.image_paths[0].c_str(), O_RDWR | O_CLOEXEC));
  }
  void fail(const Error& error) override { failure = error; }
  bool must_end() const override { return failure.has_value(); }
  void on_connection() override {}
  memory::PresenceMap& presence() { return *core->region(0).presence; }
  uint64_t word(uint64_t page) {
    uint64_t word = 0;
    EXPECT_EQ(::pread(image.get(), &word, 8, static_cast<off_t>(page * kPage)), 8);
    return word;
  }

  FetchHarness host{FetchHarness::Specs{{kGatePages, [](uint64_t page) { return page % 4 != 3; }}}};
  FetchOptions options;
  std::unique_ptr<ImageCore> core;
  std::optional<FetchCore> fetch;
  std::optional<PageGate> gate;
  std::optional<Error> failure;
  UniqueFd image;
};

/// Otherwise it would be seen when the holder says next that the page is a hole.
TEST_F(PageGateTest, APageThatIsRefusedLeavesNothingBehind) {
  host.know(12);
  for (const uint64_t page : {8, 9, 10, 11}) test::write_pattern(image.get(), 1, page);
  ASSERT_EQ(presence().claim_run(PageIndex{8}, 4), 4u);
  gate->publish(0, {PageIndex{8}, 4});
  EXPECT_EQ(presence().state(PageIndex{10}), PageState::kPresent);
  EXPECT_EQ(presence().state(PageIndex{11}), PageState::kAbsent) << "it is a hole of the image";
  EXPECT_EQ(word(11), 0u);
  EXPECT_EQ(fetch->unclaimed_count(), 1u);
  EXPECT_EQ(core->fill().pages_present(), 3u);
  EXPECT_FALSE(failure);
}

TEST_F(PageGateTest, AHoleWhoseDigestComesAfterItsMarkFailsTheImage) {
  host.know(4);
  EXPECT_TRUE(gate->may_be_zero(0, PageIndex{3}));
  EXPECT_FALSE(gate->may_be_zero(0, PageIndex{2}));
  EXPECT_TRUE(gate->may_be_zero(0, PageIndex{6})) << "not known";
  ASSERT_TRUE(presence().mark_zero(PageIndex{3}));
  ASSERT_TRUE(presence().mark_zero(PageIndex{6}));
  EXPECT_TRUE(gate->zeros_are_right(0, {PageIndex{0}, 8}));
  host.know(8);
  EXPECT_FALSE(gate->zeros_are_right(0, {PageIndex{0}, 8}));
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kDamaged);
}

TEST_F(PageGateTest, AFileThatWasCutIsAnErrorAndNoSignal) {
  host.know_all();
  test::write_pattern(image.get(), 1, 8);
  ASSERT_EQ(presence().claim_run(PageIndex{8}, 1), 1u);
  ASSERT_EQ(::ftruncate(image.get(), 0), 0);
  gate->publish(0, {PageIndex{8}, 1});
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kRegionChanged);
  EXPECT_EQ(core->fill().pages_present(), 0u);
}

/// F11 and F12: the claim on which a fault was to wait has been given up.
TEST_F(PageGateTest, AWaitForAClaimThatIsGivenUpIsNotNoted) {
  WaitList list(*core);
  const WaitList::Wait wait{0, page_key(0, PageIndex{8}), 1};
  ASSERT_TRUE(presence().claim(PageIndex{8}));
  EXPECT_TRUE(list.add(wait, PageState::kClaimed));
  list.remove(0);
  presence().unclaim({PageIndex{8}, 1});
  EXPECT_FALSE(list.add(wait, PageState::kClaimed));
  EXPECT_TRUE(list.empty());
  EXPECT_TRUE(list.add(wait, PageState::kAbsent)) << "there was no room to ask for it";
}

}  // namespace
}  // namespace vmigrate::pager
