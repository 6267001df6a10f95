#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

namespace vmigrate::test {

/// A private directory on tmpfs, removed with the object.
class TempDir {
 public:
  TempDir() {
    char name[] = "/dev/shm/vmigrate-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace vmigrate::test
