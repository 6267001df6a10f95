#pragma once

#include <gtest/gtest.h>
#include <sys/mount.h>

#include <string>

#include "tests/support/temp_dir.hpp"

namespace vmigrate::test {

/// A separate tmpfs that is soon full.
class SmallTmpfs {
 public:
  explicit SmallTmpfs(const char* options) {
    is_mounted_ = ::mount("tmpfs", dir_.path().c_str(), "tmpfs", 0, options) == 0;
  }
  ~SmallTmpfs() {
    if (is_mounted_) ::umount2(dir_.path().c_str(), MNT_DETACH);
  }
  void resize(const char* options) const {
    ASSERT_EQ(::mount("tmpfs", dir_.path().c_str(), "tmpfs", MS_REMOUNT, options), 0);
  }
  bool is_mounted() const { return is_mounted_; }
  const std::string& path() const { return dir_.path(); }

 private:
  TempDir dir_;
  bool is_mounted_ = false;
};

}  // namespace vmigrate::test
