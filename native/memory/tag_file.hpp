#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "memory/page_tags.hpp"

namespace vmigrate::memory {

/// The tags of a region's pages as they arrived, in a file beside the region, so that they survive this
/// process. A page's tag is stored before the page becomes present, and a page that is fetched again is
/// tagged again. A page that never arrived has zeros. Any thread, if two never have the same page.
class TagFile {
 public:
  /// Creates the file anew, with all tags zero. kNoSpace if the file system cannot hold it.
  static Result<std::unique_ptr<TagFile>> create(const std::string& path, uint64_t page_count);
  /// Opens the file of an earlier process. kCorrupt if it is not one for so many pages.
  static Result<std::unique_ptr<TagFile>> reopen(const std::string& path, uint64_t page_count);
  ~TagFile();
  TagFile(const TagFile&) = delete;
  TagFile& operator=(const TagFile&) = delete;

  std::span<std::byte> tags(PageRun run);

 private:
  TagFile(std::byte* mapping, uint64_t page_count) : mapping_(mapping), page_count_(page_count) {}
  static Result<std::unique_ptr<TagFile>> map(const UniqueFd& fd, uint64_t page_count);

  std::byte* const mapping_;
  const uint64_t page_count_;
};

/// The digests of chunks of a region whose pages have all arrived, from their tags.
Result<std::vector<std::byte>> digest_arrived_chunks(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes, const ChunkRequest& request);

}  // namespace vmigrate::memory
