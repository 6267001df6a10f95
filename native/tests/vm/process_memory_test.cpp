// A process that is gone is distinguished from every other failure, and the errno is kept.

#include "vm/process_memory.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/mapping.hpp"
#include "vm/process_file_error.hpp"

namespace vmigrate::pager {
namespace {

/// A process that has ended and was reaped. The kernel reuses a pid only after all others.
pid_t ended_process() {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  EXPECT_EQ(::waitpid(child, nullptr, 0), child);
  return child;
}

TEST(ProcessMemory, OfAProcessThatIsGoneCannotBeOpened) {
  VmMemory memory;
  memory.pid = ended_process();
  const auto opened = ProcessMemory::open(memory);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kProcessGone);
  EXPECT_EQ(opened.error().system_errno, ENOENT);
  EXPECT_STREQ(opened.error().what, "open /proc/PID/mem");
}

TEST(ProcessMemory, MappingsOfAProcessThatIsGoneCannotBeChecked) {
  const Status checked = check_mapped(ended_process(), MappedRange{}, FileIdentity{}, false);
  ASSERT_FALSE(checked.ok());
  EXPECT_EQ(checked.error().code, ErrorCode::kProcessGone);
  EXPECT_EQ(checked.error().system_errno, ENOENT);
}

TEST(ProcessFileError, CallsNothingElseAProcessThatIsGone) {
  EXPECT_EQ(process_file_error("open", ESRCH).code, ErrorCode::kProcessGone);
  EXPECT_EQ(process_file_error("open", EACCES).code, ErrorCode::kNotPermitted);
  EXPECT_EQ(process_file_error("open", EMFILE).code, ErrorCode::kSystem);
  EXPECT_EQ(process_file_error("open", EMFILE).system_errno, EMFILE);
}

}  // namespace
}  // namespace vmigrate::pager
