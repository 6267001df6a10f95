#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstddef>
#include <span>
#include <string>

#include "base/check.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::fuzz {

/// A file in memory that is written anew for each input, and removed at the end.
class OneFile {
 public:
  OneFile() {
    VMG_CHECK(::mkdtemp(folder_.data()) != nullptr);
    path_ = folder_ + "/file";
  }
  OneFile(OneFile&&) = delete;
  ~OneFile() {
    ::unlink(path_.c_str());
    ::rmdir(folder_.c_str());
  }
  OneFile(const OneFile&) = delete;
  OneFile& operator=(const OneFile&) = delete;

  const std::string& path() const { return path_; }
  /// The header, zeros up to `body_at`, and the body.
  template <typename Header>
  void write(const Header& header, size_t body_at, std::span<const std::byte> body) const {
    const UniqueFd fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_TRUNC, 0600));
    VMG_CHECK(fd.valid() && ::pwrite(fd.get(), &header, sizeof header, 0) == sizeof header);
    VMG_CHECK(::ftruncate(fd.get(), static_cast<off_t>(body_at)) == 0);
    VMG_CHECK(::pwrite(fd.get(), body.data(), body.size(), static_cast<off_t>(body_at)) ==
              static_cast<ssize_t>(body.size()));
  }

 private:
  std::string folder_ = "/dev/shm/vmigrate-fuzz-XXXXXX";
  std::string path_;
};

}  // namespace vmigrate::fuzz
