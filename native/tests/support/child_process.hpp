#pragma once

#include <sys/types.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "base/unique_fd.hpp"

namespace vmigrate::test {

/// A program under test, with pipes to its standard streams. The destructor kills and reaps it.
class ChildProcess {
 public:
  ChildProcess(const std::vector<std::string>& arguments,
               const std::map<std::string, std::string>& environment);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }
  void write_line(const std::string& line);
  /// Next line of its stdout; "(timeout)" or "(end)" if there is none.
  std::string read_line(std::chrono::milliseconds timeout = std::chrono::seconds(20));
  /// Sends one command and returns its answer, in preload_helper's protocol.
  std::string ask(const std::string& line) {
    write_line(line);
    return read_line();
  }
  bool is_running() const;
  void kill_now();
  /// Returns all of stderr, after the process has ended.
  std::string error_text();

 private:
  pid_t pid_ = -1;
  bool is_reaped_ = false;
  UniqueFd in_, out_, error_;
  std::string unread_;
};

}  // namespace vmigrate::test
