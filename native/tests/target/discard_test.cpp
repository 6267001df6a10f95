// Tests a VM that gives pages back (balloon, free page reporting) while its memory is being filled. A vCPU
// that touches such a page again reads zeros at once, and all other pages are unchanged.

#include <fcntl.h>
#include <gtest/gtest.h>

#include "base/page_key.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using test::kPage;
using test::PagerHarness;
using test::Parking;
using wire::InjectPoint;
using wire::TargetCounter;

constexpr uint64_t kLargePage = 2 << 20;

void discard(const PagerHarness& vm, uint64_t page) {
  const UniqueFd fd(::open(vm.regions[0].target_path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        static_cast<off_t>(page * kPage), kPage),
            0);
}

/// A session whose second region does not arrive, so that it keeps working whatever happens to the first.
void start_and_hold(PagerHarness& vm) {
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  vm.bulk->hold_if([](const transport::Operation& op) { return op.remote.length_bytes == kPage; });
  ASSERT_TRUE(vm.session->start().ok());
}

// The kernel maps and discards 4 KiB while the pager works in 2 MiB: most of the page is still mapped.
TEST(Discard, PartOfALargePageThatIsPresent) {
  PagerHarness vm(PagerHarness::Specs{{1, [](uint64_t) { return true; }, kLargePage}, {1}});
  start_and_hold(vm);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesPresent) == 1; }));
  discard(vm, 9);
  auto reading = vm.touch(0, 9);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  auto neighbour = vm.touch(0, 10);
  ASSERT_TRUE(PagerHarness::arrives(neighbour));
  EXPECT_EQ(neighbour.get(), vm.expected(0, 10));
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
}

TEST(Discard, PartOfALargePageThatIsZero) {
  PagerHarness vm(PagerHarness::Specs{{1, [](uint64_t) { return false; }, kLargePage}, {1}});
  start_and_hold(vm);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 1; }));
  auto* first = reinterpret_cast<volatile uint64_t*>(vm.regions[0].base);
  *first = 5;
  discard(vm, 9);
  auto reading = vm.touch(0, 9);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  EXPECT_EQ(*first, 5u);
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
}

// Zeros cannot be mapped because there is a page. When that page is to be mapped, it is gone.
TEST(Discard, BetweenFindingAPageAndMappingIt) {
  Parking parking;
  PagerHarness vm(PagerHarness::Specs{{16, [](uint64_t) { return false; }}, {1}});
  start_and_hold(vm);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesZero) == 16; }));
  const UniqueFd fd(::open(vm.regions[0].target_path.c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t word = 7;
  ASSERT_EQ(::pwrite(fd.get(), &word, sizeof word, 4 * kPage), static_cast<ssize_t>(sizeof word));
  parking.arm(InjectPoint::kTargetBeforePublish, page_key(0, PageIndex{4}));
  auto reading = vm.touch(0, 4);
  ASSERT_TRUE(parking.wait_parked());
  discard(vm, 4);
  parking.release();
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), 0u);
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
}

}  // namespace
}  // namespace vmigrate::pager
