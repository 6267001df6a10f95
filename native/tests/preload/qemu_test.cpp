// Tests the preload inside a real QEMU: it must start as it does without the preload, in the sandbox too.

#include <thread>

#include "tests/preload/preload_fixture.hpp"

namespace vmigrate::test {
namespace {

using pager::VmState;

class PreloadQemuTest : public PreloadTest, public ::testing::WithParamInterface<bool> {};

TEST_P(PreloadQemuTest, StartsWithTwoNumaBackends) {
  if (::system("command -v qemu-system-x86_64 >/dev/null") != 0)
    GTEST_SKIP() << "qemu-system-x86_64 is not installed";
  const std::vector<pager::RegionFileConfig> regions = {region("ram0", 64 * kMiB),
                                                        region("ram1", 192 * kMiB)};
  auto listener = listen(regions);
  std::vector<std::string> arguments = {"qemu-system-x86_64",
                                        "-S",
                                        "-display",
                                        "none",
                                        "-nodefaults",
                                        "-M",
                                        "q35",
                                        "-accel",
                                        "tcg",
                                        "-m",
                                        "256",
                                        "-smp",
                                        "2",
                                        "-incoming",
                                        "defer",
                                        "-qmp",
                                        "stdio"};
  for (size_t i = 0; i < regions.size(); i++) {
    const std::string id = std::to_string(i);
    arguments.insert(arguments.end(),
                     {"-object",
                      "memory-backend-file,share=on,id=m" + id + ",mem-path=" + regions[i].path +
                          ",size=" + std::to_string(regions[i].length_bytes),
                      "-numa", "node,nodeid=" + id + ",memdev=m" + id + ",cpus=" + id});
  }
  if (GetParam())
    arguments.insert(arguments.end(),
                     {"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"});
  ChildProcess qemu(arguments, environment(regions, 2));
  ASSERT_EQ(wait_for(*listener, VmState::kComplete), VmState::kComplete) << qemu.error_text();
  EXPECT_EQ(listener->snapshot().pid, qemu.pid());
  EXPECT_EQ(listener->snapshot().ranges.size(), 3u);  // 64 MiB in one piece, 192 MiB over two descriptors

  EXPECT_NE(qemu.read_line().find("\"QMP\""), std::string::npos);
  EXPECT_NE(qemu.ask("{\"execute\":\"qmp_capabilities\"}").find("return"), std::string::npos);
  const std::string status = qemu.ask("{\"execute\":\"query-status\"}");
  EXPECT_NE(status.find("inmigrate"), std::string::npos) << status;
  EXPECT_TRUE(qemu.is_running());
  qemu.write_line("{\"execute\":\"quit\"}");
  EXPECT_EQ(wait_for(*listener, VmState::kGone), VmState::kGone);
  EXPECT_EQ(qemu.error_text(), "");
}

INSTANTIATE_TEST_SUITE_P(Sandbox, PreloadQemuTest, ::testing::Bool(),
                         [](const auto& instance) { return instance.param ? "On" : "Off"; });

}  // namespace
}  // namespace vmigrate::test
