#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/child_process.hpp"
#include "vm/preload_listener.hpp"

namespace vmigrate::test {

inline constexpr uint64_t kMiB = uint64_t{1} << 20;

/// A directory on tmpfs with region files in it, a socket path, and programs that run with the preload.
class PreloadTest : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  /// Makes a sparse region file.
  pager::RegionFileConfig region(const std::string& name, uint64_t length_bytes);
  std::unique_ptr<pager::PreloadListener> listen(std::vector<pager::RegionFileConfig> regions,
                                                 bool incoming = true);
  std::map<std::string, std::string> environment(const std::vector<pager::RegionFileConfig>& regions,
                                                 unsigned sync_fds = 1) const;
  /// Starts preload_helper with the preload.
  std::unique_ptr<ChildProcess> helper(const std::vector<pager::RegionFileConfig>& regions,
                                       unsigned sync_fds = 1);
  /// Waits until the listener is in the state, at most 30 s.
  static pager::VmState wait_for(const pager::PreloadListener& listener, pager::VmState state);

  std::string directory_;
  std::atomic<int> edges_{0};
};

std::string map_line(const pager::RegionFileConfig& region, const std::string& how = "shared");

}  // namespace vmigrate::test
