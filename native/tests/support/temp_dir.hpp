#pragma once

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <string>
#include <string_view>

namespace vmigrate::test {

/// A private directory on tmpfs, removed with the object. Some tests end their process on purpose; the next
/// process removes what they have left, which it knows by the id of the process in the name.
class TempDir {
 public:
  TempDir() {
    static const bool swept = sweep();
    (void)swept;
    std::string name = std::string(kParent) + "/" + kPrefix + std::to_string(::getpid()) + ".XXXXXX";
    path_ = ::mkdtemp(name.data());
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
  static constexpr const char* kParent = "/dev/shm";
  static constexpr const char* kPrefix = "vmigrate-test-";

  static bool sweep() {
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(kParent, ignored)) {
      const std::string name = entry.path().filename();
      const std::string_view prefix = kPrefix;
      if (!name.starts_with(prefix)) continue;
      pid_t pid = 0;
      const auto [end, error] = std::from_chars(name.data() + prefix.size(), name.data() + name.size(), pid);
      if (error != std::errc() || *end != '.' || pid <= 0) continue;
      if (::kill(pid, 0) != 0 && errno == ESRCH) std::filesystem::remove_all(entry.path(), ignored);
    }
    return true;
  }

  std::string path_;
};

}  // namespace vmigrate::test
