#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "tests/preload/preload_fixture.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::test {
namespace {

using pager::PreloadListener;
using pager::VmSnapshot;
using pager::VmState;
using Kind = wire::PreloadDescriptor;

const std::string kRefusedMapping = "failed " + std::to_string(EIO);

/// Polls the sync descriptor and reads the fault that is waiting there.
uffd::FaultEvent next_fault(const pager::VmMemory& memory) {
  for (const auto& descriptor : memory.descriptors) {
    if (descriptor.kind != Kind::kSync) continue;
    pollfd entry{descriptor.fd.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&entry, 1, 10'000), 1);
    uffd::FaultEvent fault;
    EXPECT_EQ(uffd::read_faults(descriptor.fd.get(), std::span(&fault, 1)).count, 1u);
    return fault;
  }
  return {};
}

TEST_F(PreloadTest, RegistersARegionBeforeTheMappingReturns) {
  const auto ram = region("ram", 8 * kMiB);
  auto listener = listen({ram});
  EXPECT_EQ(listener->snapshot().state, VmState::kWaiting);
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  ASSERT_EQ(listener->snapshot().state, VmState::kComplete);
  ASSERT_NE(listener->memory(), nullptr);
  EXPECT_EQ(listener->memory()->pid, vm->pid());
  EXPECT_FALSE(std::filesystem::exists(path("socket")));

  // A touch must wait for the test, on a page that is not in the file, and be answered through the test's
  // descriptor.
  vm->write_line("touch 0 12345");
  const uffd::FaultEvent fault = next_fault(*listener->memory());
  const HostAddr base = listener->memory()->ranges.at(0).base;
  EXPECT_EQ(raw(fault.address) - raw(base), 12345u / 4096 * 4096);
  EXPECT_FALSE(fault.is_minor);
  EXPECT_EQ(vm->read_line(std::chrono::milliseconds(50)), "(timeout)");
  UniqueFd file(::open(ram.path.c_str(), O_RDWR | O_CLOEXEC));
  const unsigned char value = 99;
  ASSERT_EQ(::pwrite(file.get(), &value, 1, 12345), 1);
  const int fd = listener->memory()->descriptors.at(0).fd.get();
  EXPECT_EQ(uffd::continue_range(fd, base + 12345 / 4096 * 4096, 4096).outcome, uffd::Outcome::kDone);
  EXPECT_EQ(vm->read_line(), "byte 99");
}

TEST_F(PreloadTest, SeveralRegionsFromSeveralThreads) {
  std::vector<pager::RegionFileConfig> regions;
  std::string line = "map-all " + std::to_string(2 * kMiB);
  for (int i = 0; i < 8; i++) {
    regions.push_back(region("ram" + std::to_string(i), 2 * kMiB));
    line += " " + regions.back().path;
  }
  auto listener = listen(regions);
  auto vm = helper(regions);
  EXPECT_EQ(vm->ask(line), "mapped-all 8");
  EXPECT_EQ(listener->snapshot().state, VmState::kComplete);
  EXPECT_EQ(listener->snapshot().ranges.size(), 8u);
  EXPECT_EQ(wait_for(*listener, VmState::kComplete), VmState::kComplete);
}

TEST_F(PreloadTest, StripesABigRegionOverSeveralDescriptors) {
  const auto big = region("big", 256 * kMiB + 4096), small = region("small", kMiB);
  auto listener = listen({big, small});
  auto vm = helper({big, small}, 3);
  EXPECT_EQ(vm->ask(map_line(small)), "mapped 0");
  EXPECT_EQ(listener->snapshot().state, VmState::kAttached);
  EXPECT_EQ(listener->memory(), nullptr);
  EXPECT_EQ(vm->ask(map_line(big)), "mapped 1");
  const VmSnapshot snapshot = listener->snapshot();
  ASSERT_EQ(snapshot.state, VmState::kComplete);
  size_t sync_count = 0;
  for (const auto& descriptor : snapshot.descriptors) {
    sync_count += descriptor.kind == Kind::kSync;
    EXPECT_GE(descriptor.number_in_vm, 900);
  }
  EXPECT_EQ(sync_count, 3u);
  ASSERT_EQ(snapshot.ranges.size(), 4u);
  uint64_t next = 0;
  for (size_t i = 1; i < 4; i++) {
    EXPECT_EQ(snapshot.ranges[i].region_offset_bytes, next);
    EXPECT_EQ(snapshot.ranges[i].descriptor_index, i - 1);
    EXPECT_GE(snapshot.ranges[i].length_bytes, pager::kStripeBytesMin);
    next += snapshot.ranges[i].length_bytes;
  }
  EXPECT_EQ(next, big.length_bytes);
}

TEST_F(PreloadTest, HasOneAsyncDescriptorWhereTheKernelCan) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  ASSERT_EQ(vm->ask(map_line(ram)), "mapped 0");
  size_t async_count = 0;
  for (const auto& descriptor : listener->snapshot().descriptors)
    async_count += descriptor.kind == Kind::kAsyncWp;
  EXPECT_EQ(async_count, uffd::probe().wp_async ? 1u : 0u);
}

TEST_F(PreloadTest, AFixedMappingOverAReservationWorks) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram, "fixed")), "mapped 0");
  EXPECT_EQ(listener->snapshot().state, VmState::kComplete);
}

TEST_F(PreloadTest, ARefusedMappingFailsAndGivesTheReservationBack) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram, "private")), kRefusedMapping);
  EXPECT_EQ(listener->snapshot().state, VmState::kRefused);
  ASSERT_TRUE(listener->snapshot().failure.has_value());
  EXPECT_EQ(listener->snapshot().failure->code, ErrorCode::kUnsupported);
  // Every later mapping fails too.
  EXPECT_EQ(vm->ask(map_line(ram, "fixed")), kRefusedMapping);
  EXPECT_EQ(vm->error_text().find("the reservation is gone"), std::string::npos);
}

TEST_F(PreloadTest, MappingARegionTwiceIsRefusedAndTheFirstMappingStays) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  EXPECT_EQ(vm->ask(map_line(ram, "fixed")), kRefusedMapping);
  EXPECT_EQ(listener->snapshot().state, VmState::kComplete);
  EXPECT_EQ(listener->snapshot().ranges.size(), 1u);
  EXPECT_EQ(vm->error_text().find("the reservation is gone"), std::string::npos);
}

TEST_F(PreloadTest, AFileThatWasReplacedIsRefused) {
  const auto ram = region("ram", kMiB);
  auto wrong = ram;
  wrong.length_bytes = 2 * kMiB;
  auto listener = listen({wrong});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), kRefusedMapping);
  EXPECT_EQ(listener->snapshot().failure->code, ErrorCode::kRegionChanged);
}

TEST_F(PreloadTest, WithoutAnAgentNoRegionIsMappedButAllElseWorks) {
  const auto ram = region("ram", kMiB), other = region("other", kMiB);
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), kRefusedMapping);
  EXPECT_EQ(vm->ask(map_line(other)), "mapped 0");
  EXPECT_EQ(vm->ask("environment"), "environment ");
  EXPECT_NE(vm->error_text().find("cannot reach the agent"), std::string::npos);
}

TEST_F(PreloadTest, AnAgentThatDiesInBetweenMakesTheNextMappingFail) {
  const auto ram = region("ram", kMiB), more = region("more", kMiB);
  auto listener = listen({ram, more});
  auto vm = helper({ram, more});
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  listener.reset();
  EXPECT_EQ(vm->ask(map_line(more)), kRefusedMapping);
}

TEST_F(PreloadTest, BadVariablesAreAnErrorThatStopsEverySharedFile) {
  const auto ram = region("ram", kMiB);
  for (const auto& [name, value] : std::vector<std::pair<std::string, std::string>>{
           {"VMIGRATE_PRELOAD_FILES", "relative/path"},
           {"VMIGRATE_PRELOAD_FILES", "\n\n"},
           {"VMIGRATE_PRELOAD_SYNC_FDS", "0"},
           {"VMIGRATE_PRELOAD_SYNC_FDS", "16"},
           {"VMIGRATE_PRELOAD_SYNC_FDS", "1x"},
           {"VMIGRATE_PRELOAD_SOCKET", "/" + std::string(200, 'x')}}) {
    auto variables = environment({ram});
    variables[name] = value;
    ChildProcess vm({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, variables);
    EXPECT_EQ(vm.ask(map_line(ram)), kRefusedMapping) << name << "=" << value;
    EXPECT_EQ(vm.ask("environment"), "environment ");
    EXPECT_NE(vm.error_text().find("vmigrate-preload: VMIGRATE_PRELOAD_"), std::string::npos);
  }
}

TEST_F(PreloadTest, ChildrenSeeNeitherVariablesNorDescriptors) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  EXPECT_EQ(vm->ask("environment"), "environment ");
  EXPECT_EQ(vm->ask("descriptors"), "descriptors 0");
  // The lowest free number is the same as without the preload, whatever other descriptors the test's parent
  // left open.
  ChildProcess plain({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, {});
  EXPECT_EQ(vm->ask("open"), plain.ask("open"));
}

TEST_F(PreloadTest, OtherEntriesOfLdPreloadStay) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto variables = environment({ram});
  variables["LD_PRELOAD"] = "libdl.so.2:" VMIGRATE_PRELOAD_PATH " libm.so.6";
  ChildProcess vm({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, variables);
  EXPECT_EQ(vm.ask("environment"), "environment LD_PRELOAD=libdl.so.2:libm.so.6 ");
}

TEST_F(PreloadTest, AProcessWithoutTheSocketVariableIsLeftAlone) {
  const auto ram = region("ram", kMiB);
  ChildProcess vm({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, {{"LD_PRELOAD", VMIGRATE_PRELOAD_PATH},
                                                              {"VMIGRATE_PRELOAD_FILES", ram.path},
                                                              {"ASAN_OPTIONS", "verify_asan_link_order=0"}});
  EXPECT_EQ(vm.ask(map_line(ram)), "mapped 0");
  EXPECT_EQ(vm.ask("environment"),
            "environment LD_PRELOAD=" VMIGRATE_PRELOAD_PATH " VMIGRATE_PRELOAD_FILES=" + ram.path + " ");
  EXPECT_EQ(vm.ask("descriptors"), "descriptors 0");
}

TEST_F(PreloadTest, AFileThatIsNoRegionIsUntouched) {
  const auto ram = region("ram", kMiB), other = region("other", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(other)), "mapped 0");
  EXPECT_EQ(vm->ask("touch 0 5000"), "byte 0");
  EXPECT_EQ(listener->snapshot().state, VmState::kAttached);
}

TEST_F(PreloadTest, AForkedChildCannotMapARegion) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask("fork-map " + ram.path + " " + std::to_string(kMiB)), kRefusedMapping);
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  EXPECT_EQ(listener->snapshot().state, VmState::kComplete);
}

TEST_F(PreloadTest, TheEndOfTheProcessIsNoticedInEachState) {
  const auto ram = region("ram", kMiB);
  // The callback comes after the state is visible, so the test waits for it too.
  const auto edges_reach = [this](int count) {
    for (int tries = 0; tries < 2000 && edges_ < count; ++tries)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return edges_.load();
  };
  for (const bool is_mapped : {false, true}) {
    edges_ = 0;
    auto listener = listen({ram});
    auto vm = helper({ram});
    ASSERT_EQ(wait_for(*listener, VmState::kAttached), VmState::kAttached);
    if (is_mapped) {
      ASSERT_EQ(vm->ask(map_line(ram)), "mapped 0");
    }
    const int edges_alive = is_mapped ? 2 : 1;
    ASSERT_EQ(edges_reach(edges_alive), edges_alive);
    vm->kill_now();
    EXPECT_EQ(wait_for(*listener, VmState::kGone), VmState::kGone);
    EXPECT_EQ(edges_reach(edges_alive + 1), edges_alive + 1);
    EXPECT_EQ(listener->memory() != nullptr, is_mapped);
  }
}

TEST_F(PreloadTest, ANewAgentTakesTheDescriptorsBack) {
  const auto ram = region("ram", 4 * kMiB);
  auto first = listen({ram});
  auto vm = helper({ram});
  ASSERT_EQ(vm->ask(map_line(ram)), "mapped 0");
  const VmSnapshot snapshot = first->snapshot();
  vm->write_line("touch 0 8192");
  next_fault(*first->memory());
  first.reset();
  // No agent listens: the fault must wait and not read a zero.
  EXPECT_EQ(vm->read_line(std::chrono::milliseconds(100)), "(timeout)");

  auto adopted = PreloadListener::adopt(snapshot, {ram}, [this] { edges_++; });
  ASSERT_TRUE(adopted.ok()) << adopted.error().what;
  auto second = std::move(adopted).value();
  ASSERT_NE(second->memory(), nullptr);
  const auto& range = second->memory()->ranges.at(0);
  const int fd = second->memory()->descriptors.at(range.descriptor_index).fd.get();
  UniqueFd file(::open(ram.path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::pwrite(file.get(), "z", 1, 8192), 1);
  EXPECT_EQ(uffd::continue_range(fd, range.base + 8192, 4096).outcome, uffd::Outcome::kDone);
  EXPECT_EQ(vm->read_line(), "byte " + std::to_string('z'));

  vm->kill_now();
  EXPECT_EQ(wait_for(*second, VmState::kGone), VmState::kGone);
  const auto late = PreloadListener::adopt(snapshot, {ram}, nullptr);
  ASSERT_FALSE(late.ok());
  EXPECT_EQ(late.error().code, ErrorCode::kProcessGone);
}

TEST_F(PreloadTest, AdoptingSomethingElseIsRefused) {
  const auto ram = region("ram", 4 * kMiB), other = region("other", 4 * kMiB);
  auto listener = listen({ram});
  auto vm = helper({ram});
  ASSERT_EQ(vm->ask(map_line(ram)), "mapped 0");
  const VmSnapshot good = listener->snapshot();
  const auto code_of = [](const VmSnapshot& snapshot, const pager::RegionFileConfig& region) {
    auto result = PreloadListener::adopt(snapshot, {region}, nullptr);
    return result.ok() ? ErrorCode{} : result.error().code;
  };
  EXPECT_EQ(code_of(good, ram), ErrorCode{});
  EXPECT_EQ(code_of(good, other), ErrorCode::kRegionChanged);
  VmSnapshot bad = good;
  bad.pid = ::getpid();  // alive, but not the VM
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kProcessGone);
  bad = good;
  bad.descriptors[0].number_in_vm = 0;
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kProcessGone);
  bad = good;
  bad.descriptors[0].number_in_vm = -1;
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kProcessGone);
  bad = good;
  bad.ranges[0].base = bad.ranges[0].base + 4096;
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kRegionChanged);
  bad = good;
  bad.ranges[0].length_bytes -= 4096;
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kInvalidArgument);
  bad = good;
  bad.ranges[0].descriptor_index = 7;
  EXPECT_EQ(code_of(bad, ram), ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace vmigrate::test
