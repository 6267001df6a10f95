// Tests that a session without work does nothing: no core burns while a connection is gone.

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <thread>

#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::PagerHarness;
using wire::TargetCounter;

struct Work {
  std::chrono::microseconds cpu;
  long wakeups;
};

/// The CPU time and wake-ups of this process in `time`, while nobody asks anything of it.
Work work_in(std::chrono::milliseconds time) {
  const auto used = [] {
    rusage usage{};
    EXPECT_EQ(::getrusage(RUSAGE_SELF, &usage), 0);
    const auto micros = [](const timeval& t) { return 1s * t.tv_sec + 1us * t.tv_usec; };
    return Work{micros(usage.ru_utime) + micros(usage.ru_stime), usage.ru_nvcsw};
  };
  const Work before = used();
  std::this_thread::sleep_for(time);
  const Work after = used();
  return {after.cpu - before.cpu, after.wakeups - before.wakeups};
}

TEST(Idle, WaitingForANewConnectionWithAFaultInHand) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.start(false);
  vm.demand->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kFaultCount) == 1; }));
  EXPECT_LT(work_in(500ms).wakeups, 100);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(PagerHarness::arrives(reading));
  EXPECT_EQ(reading.get(), vm.expected(0, 3));
}

// The demand thread neither polls nor posts while the session is disconnected. So it must not watch its own
// dead connection either, which stays readable for ever.
TEST(Idle, LossThatTheBulkThreadReportsFirst) {
  PagerHarness vm(PagerHarness::Specs{{16}});
  vm.start(false);
  auto reading = vm.touch(0, 3);
  ASSERT_TRUE(PagerHarness::arrives(reading));  // so the demand thread has taken its connection
  vm.bulk->disconnect();
  ASSERT_TRUE(vm.reaches(TargetState::kDisconnected));
  vm.demand->disconnect();
  EXPECT_LT(work_in(500ms).cpu, 100ms);
  EXPECT_TRUE(vm.demand->was_destroyed());
  auto waiting = vm.touch(0, 5);
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kFaultCount) == 2; }));
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(PagerHarness::arrives(waiting));
  EXPECT_EQ(waiting.get(), vm.expected(0, 5));
}

TEST(Idle, ConnectionLostWhenEveryPageHasBeenFetchedOnDemand) {
  PagerHarness vm(PagerHarness::Specs{{1}});
  vm.map_vm();
  vm.finish_maps();
  vm.open();
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->serve_demand().ok());
  auto reading = vm.touch(0, 0);
  ASSERT_TRUE(PagerHarness::arrives(reading));
  ASSERT_TRUE(test::eventually([&] { return vm.counter(TargetCounter::kPagesPresent) == 1; }));
  vm.demand->disconnect();
  EXPECT_LT(work_in(500ms).cpu, 50ms);
  EXPECT_EQ(vm.session->state(), TargetState::kFilling);
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
}

}  // namespace
}  // namespace vmigrate::pager
