#include "memory/tag_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <limits>

#include "base/check.hpp"

namespace vmigrate::memory {
namespace {

uint64_t tag_file_bytes(uint64_t page_count) {
  return page_count * wire::kPageTagBytes;
}

bool tag_count_possible(uint64_t page_count) {
  return page_count != 0 &&
         page_count <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / wire::kPageTagBytes;
}

/// A store through the mapping into a hole of a full file system would end in SIGBUS.
Status allocate_tags(int fd, uint64_t page_count) {
  int rc;
  do {
    rc = ::posix_fallocate(fd, 0, static_cast<off_t>(tag_file_bytes(page_count)));
  } while (rc == EINTR);
  if (rc != 0) return system_error("allocate tags of pages", rc == EFBIG ? ENOSPC : rc);
  return ok();
}

}  // namespace

Result<std::unique_ptr<TagFile>> TagFile::create(const std::string& path, uint64_t page_count) {
  if (!tag_count_possible(page_count)) return Error{ErrorCode::kInvalidArgument, 0, "tags page count"};
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return system_error("unlink old tags of pages");
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return system_error("create tags of pages");
  const Status allocated = allocate_tags(fd.get(), page_count);
  auto file = allocated ? map(fd, page_count) : Result<std::unique_ptr<TagFile>>(allocated.error());
  if (!file) ::unlink(path.c_str());
  return file;
}

Result<std::unique_ptr<TagFile>> TagFile::reopen(const std::string& path, uint64_t page_count) {
  if (!tag_count_possible(page_count)) return Error{ErrorCode::kInvalidArgument, 0, "tags page count"};
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd.valid()) return system_error("open tags of pages");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat tags of pages");
  if (!S_ISREG(file.st_mode) || file.st_uid != ::geteuid() ||
      static_cast<uint64_t>(file.st_size) != tag_file_bytes(page_count)) {
    return Error{ErrorCode::kCorrupt, 0, "length of the tags of pages"};
  }
  if (auto status = allocate_tags(fd.get(), page_count); !status) return status.error();
  return map(fd, page_count);
}

Result<std::unique_ptr<TagFile>> TagFile::map(const UniqueFd& fd, uint64_t page_count) {
  void* mapping =
      ::mmap(nullptr, tag_file_bytes(page_count), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapping == MAP_FAILED) return system_error("mmap tags of pages");
  return std::unique_ptr<TagFile>(new TagFile(static_cast<std::byte*>(mapping), page_count));
}

TagFile::~TagFile() {
  ::munmap(mapping_, tag_file_bytes(page_count_));
}

std::span<std::byte> TagFile::tags(PageRun run) {
  VMG_CHECK(raw(run.first) <= page_count_ && run.count <= page_count_ - raw(run.first));
  return {mapping_ + raw(run.first) * wire::kPageTagBytes, run.count * wire::kPageTagBytes};
}

Result<std::vector<std::byte>> digest_arrived_chunks(const std::string& path, uint64_t page_count,
                                                     uint64_t page_bytes, const ChunkRequest& request) {
  auto file = TagFile::reopen(path, page_count);
  if (!file) return file.error();
  return digest_chunks(request, page_count, page_bytes,
                       [&](PageTagger&, PageRun run, std::span<std::byte> tags) -> Status {
                         std::memcpy(tags.data(), file.value()->tags(run).data(), tags.size());
                         return ok();
                       });
}

}  // namespace vmigrate::memory
