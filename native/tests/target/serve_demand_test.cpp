#include <gtest/gtest.h>

#include <thread>

#include "target/target.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::PagerHarness;
using wire::TargetCounter;

TEST(ServeDemand, NothingIsPrefetchedUntilStart) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  EXPECT_EQ(vm.session->serve_demand().error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->serve_demand().ok());
  EXPECT_FALSE(vm.session->serve_demand().ok());
  auto reading = vm.touch(0, 7);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  std::this_thread::sleep_for(50ms);
  EXPECT_EQ(vm.counter(TargetCounter::kPrefetchBytes), 0u);
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
  ASSERT_TRUE(vm.session->start().ok());
  EXPECT_FALSE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  vm.session->close();
  EXPECT_EQ(vm.bad_pages(), 0u);
}

TEST(ServeDemand, ClosingWithoutStartLeavesTheRestMissing) {
  PagerHarness vm(PagerHarness::Specs{{64}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->serve_demand().ok());
  auto reading = vm.touch(0, 7);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  vm.session->close();
  EXPECT_EQ(vm.session->state(), TargetState::kClosed);
  EXPECT_FALSE(vm.session->start().ok());
}

}  // namespace
}  // namespace vmigrate::pager
