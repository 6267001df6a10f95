#pragma once

#include <string>

#include "base/unique_fd.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::test {

/// Reserves this many additional huge pages of 2 MiB, and mounts a hugetlbfs, for the duration of a test. The
/// number belongs to the machine, so tests that change it wait for one another, even across processes.
class HugePages {
 public:
  explicit HugePages(unsigned long long count);
  ~HugePages();
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  /// False: no huge pages can be reserved here.
  bool is_mounted() const { return is_mounted_; }
  const std::string& path() const { return dir_.path(); }

 private:
  const UniqueFd lock_;  // first, so that it is released after everything else is undone
  const unsigned long long before_;
  TempDir dir_;
  bool is_mounted_ = false;
};

}  // namespace vmigrate::test
