// Tests that a connection over which only small packets pass is noticed before the VM stops.

#include <gtest/gtest.h>

#include "fetch/probe.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::FakeControl;
using test::PagerHarness;

struct Probed {
  PagerHarness vm{PagerHarness::Specs{{64}}};

  Probed() {
    vm.map_vm();
    vm.open();
  }
  SourceEndpoints endpoints(std::chrono::milliseconds timeout) {
    SourceEndpoints made = vm.endpoints();
    made.probe_timeout = timeout;
    return made;
  }
};

TEST(Probe, PassesOnBothConnectionsAndPublishesNothing) {
  Probed probed;
  ASSERT_TRUE(probed.vm.session->connect(probed.endpoints(5s)).ok());
  EXPECT_EQ(probed.vm.demand->posted_count, 1u);
  EXPECT_EQ(probed.vm.bulk->posted_count, 1u);
  EXPECT_EQ(probed.vm.counter(wire::TargetCounter::kPagesPresent), 0u);
  probed.vm.finish_maps();
  ASSERT_TRUE(probed.vm.session->start().ok());
  ASSERT_TRUE(probed.vm.reaches(TargetState::kComplete));
  EXPECT_EQ(probed.vm.bad_pages(), 0u);
}

TEST(Probe, AnAnswerOfAnyKindIsOne) {
  Probed probed;
  SourceEndpoints made = probed.endpoints(5s);
  probed.vm.demand->fail_with(transport::OpResult::kIoError);
  EXPECT_TRUE(probed.vm.session->connect(std::move(made)).ok());
}

TEST(Probe, NamesAPathThatLosesWhatIsLong) {
  for (const bool is_demand : {true, false}) {
    Probed probed;
    SourceEndpoints made = probed.endpoints(50ms);
    FakeControl& control = is_demand ? *probed.vm.demand : *probed.vm.bulk;
    control.hold_if([](const transport::Operation& operation) { return operation.length_bytes > 1400; });
    const auto status = probed.vm.session->connect(std::move(made));
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::kPathStalled);
    // The next connection may be better.
    EXPECT_TRUE(probed.vm.session->connect(probed.endpoints(5s)).ok());
  }
}

TEST(Probe, ALostConnectionIsLost) {
  Probed probed;
  SourceEndpoints made = probed.endpoints(5s);
  probed.vm.bulk->disconnect();
  const auto status = probed.vm.session->connect(std::move(made));
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kDisconnected);
}

TEST(Probe, IsNotMadeUnlessAskedForNorOnceTheSessionHasBegun) {
  Probed probed;
  ASSERT_TRUE(probed.vm.session->connect(probed.vm.endpoints()).ok());
  EXPECT_EQ(probed.vm.bulk->posted_count, 0u);
  ASSERT_TRUE(probed.vm.session->start().ok());
  probed.vm.bulk->disconnect();
  probed.vm.demand->disconnect();
  ASSERT_TRUE(probed.vm.reaches(TargetState::kDisconnected));
  SourceEndpoints made = probed.endpoints(5s);
  probed.vm.demand->hold_all();
  EXPECT_TRUE(probed.vm.session->connect(std::move(made)).ok());
}

}  // namespace
}  // namespace vmigrate::pager
