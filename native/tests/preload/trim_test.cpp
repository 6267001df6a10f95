// Tests malloc_trim in a process with the preload: it works but for the time for which the agent has held it
// back.

#include <chrono>
#include <thread>

#include "tests/preload/preload_fixture.hpp"

namespace vmigrate::test {
namespace {

using pager::PreloadListener;
using pager::VmState;

constexpr uint32_t kLongMs = 600'000;

/// Asks until the answer is the expected one, at most 30 s.
std::string ask_until(ChildProcess& vm, const std::string& expected) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  std::string answer;
  do answer = vm.ask("trim");
  while (answer != expected && std::chrono::steady_clock::now() < deadline);
  return answer;
}

class PreloadTrimTest : public PreloadTest {
 protected:
  void SetUp() override {
    PreloadTest::SetUp();
    ram_ = region("ram", kMiB);
    listener_ = listen({ram_});
    vm_ = helper({ram_});
    ASSERT_EQ(vm_->ask(map_line(ram_)), "mapped 0");
    ASSERT_EQ(wait_for(*listener_, VmState::kComplete), VmState::kComplete);
  }

  pager::RegionFileConfig ram_;
  std::unique_ptr<PreloadListener> listener_;
  std::unique_ptr<ChildProcess> vm_;
};

TEST_F(PreloadTrimTest, WorksUntilItIsHeldBackAndAfterwards) {
  EXPECT_EQ(vm_->ask("trim"), "trimmed 1");
  for (int round = 0; round < 2; round++) {
    listener_->hold_trim(kLongMs);
    for (int call = 0; call < 3; call++) EXPECT_EQ(vm_->ask("trim"), "trimmed 0");
    listener_->hold_trim(0);
    EXPECT_EQ(vm_->ask("trim"), "trimmed 1");
  }
  // What was said last counts, however much was said while nobody called it.
  for (int n = 0; n < 20; n++) listener_->hold_trim(n % 2 == 0 ? kLongMs : 0);
  EXPECT_EQ(vm_->ask("trim"), "trimmed 1");
  for (int n = 0; n < 21; n++) listener_->hold_trim(n % 2 == 0 ? kLongMs : 0);
  EXPECT_EQ(vm_->ask("trim"), "trimmed 0");
}

TEST_F(PreloadTrimTest, WorksAgainWhenTheTimeIsOver) {
  listener_->hold_trim(50);
  EXPECT_EQ(ask_until(*vm_, "trimmed 1"), "trimmed 1");
}

TEST_F(PreloadTrimTest, WorksAgainWhenTheAgentIsLost) {
  listener_->hold_trim(kLongMs);
  EXPECT_EQ(vm_->ask("trim"), "trimmed 0");
  const auto snapshot = listener_->snapshot();
  listener_.reset();
  EXPECT_EQ(vm_->ask("trim"), "trimmed 1");
  // The next agent has no connection to hold it by.
  auto adopted = PreloadListener::adopt(snapshot, {ram_}, nullptr);
  ASSERT_TRUE(adopted.ok()) << adopted.error().what;
  adopted.value()->hold_trim(kLongMs);
  EXPECT_EQ(vm_->ask("trim"), "trimmed 1");
}

TEST_F(PreloadTrimTest, IsNotMistakenForTheAnswerToAMapping) {
  listener_->hold_trim(kLongMs);
  // The agent refuses a second mapping of the same bytes. The preload must find that answer behind the other
  // record.
  EXPECT_EQ(vm_->ask(map_line(ram_)), "failed " + std::to_string(EIO));
  EXPECT_EQ(vm_->ask("trim"), "trimmed 0");
  EXPECT_NE(vm_->error_text().find("the agent refused"), std::string::npos) << vm_->error_text();
}

TEST_F(PreloadTrimTest, WorksInAProcessThatIsLeftAlone) {
  ChildProcess other({VMIGRATE_TEST_BIN_DIR "/preload_helper"},
                     {{"LD_PRELOAD", VMIGRATE_PRELOAD_PATH}, {"ASAN_OPTIONS", "verify_asan_link_order=0"}});
  EXPECT_EQ(other.ask("trim"), "trimmed 1");
}

}  // namespace
}  // namespace vmigrate::test
