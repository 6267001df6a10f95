#include "tests/support/temp_dir.hpp"

#include <stdlib.h>

#include <filesystem>
#include <system_error>

namespace vmigrate::test {

TempDir::TempDir() {
  char name[] = "/dev/shm/vmigrate-test-XXXXXX";
  path_ = ::mkdtemp(name);
}
TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace vmigrate::test
