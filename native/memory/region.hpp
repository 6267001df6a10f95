#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace vmigrate::memory {

enum class Mode { kReadOnly, kReadWrite };

/// One region file (tmpfs or hugetlbfs) and our shared mapping of it. The mapping's bytes may be touched only
/// through calls that cannot end in SIGBUS (system calls, and touch_guarded), because other processes own the
/// file too: it may shrink, and the file system may be full.
class Region {
 public:
  /// Creates a new sparse file of exactly `length_bytes`. kAlreadyExists if there is one, kNoSpace if the
  /// file system cannot hold it.
  static Status create_file(const std::string& path, uint64_t length_bytes, uint64_t page_bytes);
  /// Opens and maps the file. kRegionChanged if its length is not `length_bytes`; kInvalidArgument if length
  /// or page size are impossible.
  static Result<std::unique_ptr<Region>> open(const std::string& path, uint64_t length_bytes,
                                              uint64_t page_bytes, Mode mode);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  int fd() const { return fd_.get(); }
  std::byte* base() const { return base_; }
  uint64_t length_bytes() const { return length_bytes_; }
  uint64_t page_bytes() const { return page_bytes_; }
  uint64_t page_count() const { return length_bytes_ / page_bytes_; }

  /// Calls `visit` with each run of pages that hold data (SEEK_DATA/SEEK_HOLE, widened to whole pages), in
  /// order. Does not touch the bytes.
  Status each_data_run(const std::function<void(PageRun)>& visit) const;
  /// The same for the pages of `within` that hold a non-zero byte. It reads all pages of `within`, and holes
  /// there do not stay holes. kRegionChanged if the file has shrunk.
  Status each_nonzero_run(PageRun within, const std::function<void(PageRun)>& visit) const;
  /// Copies bytes of the file. kRegionChanged if it has shrunk. Any thread.
  Status read(uint64_t offset_bytes, std::span<std::byte> out) const;
  /// False: all pages of the run are holes. Does not touch the bytes. kRegionChanged as above.
  Result<bool> may_hold_data(PageRun run) const;
  /// Makes the pages holes, whatever they hold.
  Status punch(PageRun run) const;

 private:
  Region(UniqueFd fd, std::byte* base, uint64_t length_bytes, uint64_t page_bytes);
  UniqueFd fd_;
  std::byte* base_;
  uint64_t length_bytes_;
  uint64_t page_bytes_;
};

}  // namespace vmigrate::memory
