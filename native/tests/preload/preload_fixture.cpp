#include "tests/preload/preload_fixture.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <thread>

namespace vmigrate::test {

void PreloadTest::SetUp() {
  char pattern[] = "/dev/shm/vmg-preload-test-XXXXXX";
  ASSERT_NE(::mkdtemp(pattern), nullptr);
  directory_ = pattern;
}

void PreloadTest::TearDown() {
  std::filesystem::remove_all(directory_);
}

pager::RegionFileConfig PreloadTest::region(const std::string& name, uint64_t length_bytes) {
  UniqueFd file(::open(path(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  EXPECT_TRUE(file.valid() && ::ftruncate(file.get(), static_cast<off_t>(length_bytes)) == 0);
  return {path(name), length_bytes, 4096};
}

std::unique_ptr<pager::PreloadListener> PreloadTest::listen(std::vector<pager::RegionFileConfig> regions,
                                                            bool incoming) {
  auto listener =
      pager::PreloadListener::listen({path("socket"), std::move(regions), incoming}, [this] { edges_++; });
  EXPECT_TRUE(listener.ok()) << listener.error().what;
  return std::move(listener).value();
}

std::map<std::string, std::string> PreloadTest::environment(
    const std::vector<pager::RegionFileConfig>& regions, unsigned sync_fds) const {
  std::string files;
  for (const auto& region : regions) files += region.path + "\n";
  return {{"LD_PRELOAD", VMIGRATE_PRELOAD_PATH},
          {"VMIGRATE_PRELOAD_SOCKET", path("socket")},
          {"VMIGRATE_PRELOAD_FILES", files},
          {"VMIGRATE_PRELOAD_SYNC_FDS", std::to_string(sync_fds)},
          // A sanitized helper requires that its runtime is loaded first; the preload does not prevent that.
          {"ASAN_OPTIONS", "verify_asan_link_order=0"}};
}

std::unique_ptr<ChildProcess> PreloadTest::helper(const std::vector<pager::RegionFileConfig>& regions,
                                                  unsigned sync_fds) {
  return std::make_unique<ChildProcess>(std::vector<std::string>{VMIGRATE_TEST_BIN_DIR "/preload_helper"},
                                        environment(regions, sync_fds));
}

pager::VmState PreloadTest::wait_for(const pager::PreloadListener& listener, pager::VmState state) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (listener.snapshot().state != state && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  return listener.snapshot().state;
}

std::string map_line(const pager::RegionFileConfig& region, const std::string& how) {
  return "map " + region.path + " " + std::to_string(region.length_bytes) + " 0 " + how;
}

}  // namespace vmigrate::test
