// Tests a region that is mapped copy-on-write, as a clone maps its image: it is reported, registered and
// taken back like a shared one, and never written.

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include "tests/preload/preload_fixture.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::test {
namespace {

using pager::PreloadListener;
using pager::VmState;
using uffd::Outcome;

class PreloadPrivateTest : public PreloadTest {
 protected:
  pager::RegionFileConfig image(const std::string& name) {
    auto made = region(name, kMiB);
    made.is_private = true;
    return made;
  }
  static void write_byte(const pager::RegionFileConfig& file, off_t offset, unsigned char value) {
    const UniqueFd fd(::open(file.path.c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_EQ(::pwrite(fd.get(), &value, 1, offset), 1);
  }
  static int read_byte(const pager::RegionFileConfig& file, off_t offset) {
    const UniqueFd fd(::open(file.path.c_str(), O_RDONLY | O_CLOEXEC));
    unsigned char value = 0;
    return ::pread(fd.get(), &value, 1, offset) == 1 ? value : -1;
  }
};

TEST_F(PreloadPrivateTest, WaitsForEachPageAndKeepsItsWritesToItself) {
  const auto ram = image("image");
  auto listener = listen({ram});
  auto vm = helper({ram});
  ASSERT_EQ(vm->ask(map_line(ram, "private")), "mapped 0");
  ASSERT_EQ(listener->snapshot().state, VmState::kComplete);
  const int fd = listener->memory()->descriptors.at(0).fd.get();
  const HostAddr base = listener->memory()->ranges.at(0).base;

  vm->write_line("poke 0 5000 7");
  pollfd entry{fd, POLLIN, 0};
  ASSERT_EQ(::poll(&entry, 1, 10'000), 1);
  uffd::FaultEvent fault;
  ASSERT_EQ(uffd::read_faults(fd, std::span(&fault, 1)).count, 1u);
  EXPECT_EQ(raw(fault.address) - raw(base), 4096u);
  EXPECT_EQ(vm->read_line(std::chrono::milliseconds(50)), "(timeout)");
  write_byte(ram, 5001, 99);
  ASSERT_EQ(uffd::continue_range(fd, base + 4096, 4096).outcome, Outcome::kDone);
  EXPECT_EQ(vm->read_line(), "poked");
  EXPECT_EQ(vm->ask("touch 0 5000"), "byte 7");
  EXPECT_EQ(vm->ask("touch 0 5001"), "byte 99");
  EXPECT_EQ(read_byte(ram, 5000), 0);

  // Zeros need no page in the file.
  vm->write_line("touch 0 9000");
  ASSERT_EQ(::poll(&entry, 1, 10'000), 1);
  ASSERT_EQ(uffd::read_faults(fd, std::span(&fault, 1)).count, 1u);
  ASSERT_EQ(uffd::zero_range(fd, base + 8192, 4096).outcome, Outcome::kDone);
  EXPECT_EQ(vm->read_line(), "byte 0");
  const UniqueFd file(::open(ram.path.c_str(), O_RDONLY | O_CLOEXEC));
  EXPECT_LT(::lseek(file.get(), 8192, SEEK_DATA), 0);
}

TEST_F(PreloadPrivateTest, IsMadeOfASharedOneWhereTheEnvironmentSaysSo) {
  const auto ram = image("image");
  auto listener = listen({ram}, false);
  auto variables = environment({ram});
  variables["VMIGRATE_PRELOAD_PRIVATE"] = "1";
  ChildProcess vm({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, variables);
  ASSERT_EQ(vm.ask(map_line(ram, "shared")), "mapped 0");
  ASSERT_EQ(wait_for(*listener, VmState::kComplete), VmState::kComplete);
  ASSERT_EQ(vm.ask("poke 0 5000 7"), "poked");
  EXPECT_EQ(vm.ask("touch 0 5000"), "byte 7");
  EXPECT_EQ(read_byte(ram, 5000), 0);
  EXPECT_EQ(vm.ask("environment"), "environment ");
}

TEST_F(PreloadPrivateTest, AnotherWordForItIsRefused) {
  const auto ram = image("image");
  auto listener = listen({ram});
  auto variables = environment({ram});
  variables["VMIGRATE_PRELOAD_PRIVATE"] = "yes";
  ChildProcess vm({VMIGRATE_TEST_BIN_DIR "/preload_helper"}, variables);
  EXPECT_EQ(vm.ask(map_line(ram, "shared")), "failed " + std::to_string(EIO));
}

TEST_F(PreloadPrivateTest, AMappingOfTheOtherKindIsRefused) {
  const auto ram = image("image");
  auto listener = listen({ram});
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram, "shared")), "failed " + std::to_string(EIO));
  ASSERT_EQ(listener->snapshot().state, VmState::kRefused);
  EXPECT_EQ(listener->snapshot().failure->code, ErrorCode::kUnsupported);
}

TEST_F(PreloadPrivateTest, ANewAgentTakesItBackOnlyAsWhatItIs) {
  auto ram = image("image");
  auto listener = listen({ram});
  auto vm = helper({ram});
  ASSERT_EQ(vm->ask(map_line(ram, "private")), "mapped 0");
  const auto snapshot = listener->snapshot();
  listener.reset();
  ram.is_private = false;
  const auto wrong = PreloadListener::adopt(snapshot, {ram}, nullptr);
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, ErrorCode::kRegionChanged);
  ram.is_private = true;
  const auto adopted = PreloadListener::adopt(snapshot, {ram}, nullptr);
  ASSERT_TRUE(adopted.ok()) << adopted.error().what;
  EXPECT_EQ(adopted.value()->snapshot().state, VmState::kComplete);
}

}  // namespace
}  // namespace vmigrate::test
