#include "memory/region.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

namespace vmigrate::memory {
namespace {

constexpr uint64_t kHugePageBytes = 2ull << 20;
constexpr uint64_t kGiganticPageBytes = 1ull << 30;

bool geometry_possible(uint64_t length_bytes, uint64_t page_bytes) {
  const bool page_known =
      page_bytes == wire::kPageBytesMin || page_bytes == kHugePageBytes || page_bytes == kGiganticPageBytes;
  return page_known && length_bytes != 0 && length_bytes % page_bytes == 0 &&
         length_bytes <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

int open_retrying(const std::string& path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

Result<struct statfs> file_system_of(int fd) {
  struct statfs fs {};
  int rc;
  do {
    rc = ::fstatfs(fd, &fs);
  } while (rc != 0 && errno == EINTR);
  if (rc != 0) return system_error("fstatfs region");
  return fs;
}

bool is_hugetlbfs(const struct statfs& fs) {
  return fs.f_type == HUGETLBFS_MAGIC;
}

/// hugetlbfs has only the kernel's page size; elsewhere our page is a group of the kernel's pages.
Status check_page_size(const struct statfs& fs, uint64_t page_bytes) {
  if (is_hugetlbfs(fs) && static_cast<uint64_t>(fs.f_bsize) != page_bytes) {
    return Error{ErrorCode::kInvalidArgument, 0, "region page size is not the hugetlbfs page size"};
  }
  return ok();
}

}  // namespace

Status Region::create_file(const std::string& path, uint64_t length_bytes, uint64_t page_bytes) {
  if (!geometry_possible(length_bytes, page_bytes)) {
    return Error{ErrorCode::kInvalidArgument, 0, "region length or page size"};
  }
  UniqueFd fd(open_retrying(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600));
  if (!fd.valid()) return system_error("create region file");
  const auto undo = [&](Error error) {
    ::unlink(path.c_str());
    return Status(error);
  };
  auto fs = file_system_of(fd.get());
  if (!fs) return undo(fs.error());
  if (auto status = check_page_size(fs.value(), page_bytes); !status) return undo(status.error());
  // A sparse tmpfs file reserves nothing, so this check is a snapshot and no guarantee. A later lack of room
  // gives kNoSpace at the transport. Without a block limit (f_blocks 0) there is nothing to compare with.
  const uint64_t block_bytes = static_cast<uint64_t>(fs.value().f_bsize);
  if (fs.value().f_blocks != 0 && fs.value().f_bavail < (length_bytes + block_bytes - 1) / block_bytes) {
    return undo(Error{ErrorCode::kNoSpace, ENOSPC, "region file system has too little room"});
  }
  int rc;
  do {
    rc = ::ftruncate(fd.get(), static_cast<off_t>(length_bytes));
  } while (rc != 0 && errno == EINTR);
  if (rc != 0)
    return undo(errno == EFBIG ? Error{ErrorCode::kNoSpace, EFBIG, "ftruncate region"}
                               : system_error("ftruncate region"));
  return ok();
}

Result<std::unique_ptr<Region>> Region::open(const std::string& path, uint64_t length_bytes,
                                             uint64_t page_bytes, Mode mode) {
  if (!geometry_possible(length_bytes, page_bytes)) {
    return Error{ErrorCode::kInvalidArgument, 0, "region length or page size"};
  }
  const bool writable = mode == Mode::kReadWrite;
  UniqueFd fd(open_retrying(path, (writable ? O_RDWR : O_RDONLY) | O_NOFOLLOW | O_NONBLOCK));
  if (!fd.valid()) return system_error("open region file");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat region");
  if (!S_ISREG(file.st_mode) || file.st_uid != ::geteuid())
    return Error{ErrorCode::kInvalidArgument, 0, "region is not a regular file of this user"};
  if (static_cast<uint64_t>(file.st_size) != length_bytes) {
    return Error{ErrorCode::kRegionChanged, 0, "region file has another length"};
  }
  auto fs = file_system_of(fd.get());
  if (!fs) return fs.error();
  if (auto status = check_page_size(fs.value(), page_bytes); !status) return status.error();

  void* base =
      ::mmap(nullptr, length_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) {
    // hugetlbfs reserves the whole mapping now, so a lack of huge pages shows here.
    if (errno == ENOMEM && is_hugetlbfs(fs.value())) {
      return Error{ErrorCode::kNoSpace, ENOMEM, "mmap region: too few huge pages"};
    }
    return system_error("mmap region");
  }
  // Guest memory must be neither in a core dump of the daemon nor in its child processes. Both are
  // refinements: if the kernel refuses, nothing changes here.
  (void)::madvise(base, length_bytes, MADV_DONTDUMP);
  (void)::madvise(base, length_bytes, MADV_DONTFORK);
  return std::unique_ptr<Region>(
      new Region(std::move(fd), static_cast<std::byte*>(base), length_bytes, page_bytes));
}

Region::Region(UniqueFd fd, std::byte* base, uint64_t length_bytes, uint64_t page_bytes)
    : fd_(std::move(fd)), base_(base), length_bytes_(length_bytes), page_bytes_(page_bytes) {}

Region::~Region() {
  ::munmap(base_, length_bytes_);
}

Status Region::punch(PageRun run) const {
  const auto offset = static_cast<off_t>(raw(run.first) * page_bytes_);
  const auto length = static_cast<off_t>(run.count * page_bytes_);
  int rc;
  do {
    rc = ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
  } while (rc != 0 && errno == EINTR);
  return rc == 0 ? ok() : system_error("punch holes into the region");
}

Status Region::read(uint64_t offset_bytes, std::span<std::byte> out) const {
  for (size_t done = 0; done < out.size();) {
    const ssize_t got =
        ::pread(fd_.get(), out.data() + done, out.size() - done, static_cast<off_t>(offset_bytes + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return system_error("pread region");
    if (got == 0) return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
    done += static_cast<size_t>(got);
  }
  return ok();
}

Result<bool> Region::may_hold_data(PageRun run) const {
  const uint64_t end_bytes = (raw(run.first) + run.count) * page_bytes_;
  off_t data;
  do {
    data = ::lseek(fd_.get(), static_cast<off_t>(raw(run.first) * page_bytes_), SEEK_DATA);
  } while (data < 0 && errno == EINTR);
  if (data >= 0) return static_cast<uint64_t>(data) < end_bytes;
  if (errno != ENXIO) return system_error("lseek SEEK_DATA region");
  // Only a hole from here to the end, or the file has shrunk.
  struct stat file {};
  if (::fstat(fd_.get(), &file) != 0) return system_error("fstat region");
  if (static_cast<uint64_t>(file.st_size) < end_bytes)
    return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
  return false;
}

Status Region::each_data_run(const std::function<void(PageRun)>& visit) const {
  const auto unchanged = [this]() -> Status {
    struct stat file {};
    if (::fstat(fd_.get(), &file) != 0) return system_error("fstat region");
    if (static_cast<uint64_t>(file.st_size) != length_bytes_) {
      return Error{ErrorCode::kRegionChanged, 0, "region file changed its length"};
    }
    return ok();
  };
  auto fs = file_system_of(fd_.get());
  if (!fs) return fs.error();
  if (is_hugetlbfs(fs.value())) {
    // SEEK_DATA of this file system knows no holes.
    visit(PageRun{PageIndex{0}, page_count()});
    return unchanged();
  }

  uint64_t next_page = 0;  // first page not yet visited: runs widened to whole pages may touch
  uint64_t at_bytes = 0;
  while (at_bytes < length_bytes_) {
    const off_t data = ::lseek(fd_.get(), static_cast<off_t>(at_bytes), SEEK_DATA);
    if (data < 0) {
      if (errno == EINTR) continue;
      if (errno == ENXIO) break;  // only a hole from here to the end, or the file has shrunk: checked below
      return system_error("lseek SEEK_DATA region");
    }
    off_t hole;
    do {
      hole = ::lseek(fd_.get(), data, SEEK_HOLE);
    } while (hole < 0 && errno == EINTR);
    if (hole < 0 && errno != ENXIO) return system_error("lseek SEEK_HOLE region");
    const uint64_t end_bytes =
        hole < 0 ? length_bytes_ : std::min(static_cast<uint64_t>(hole), length_bytes_);
    const uint64_t first = std::max(next_page, static_cast<uint64_t>(data) / page_bytes_);
    const uint64_t end = (end_bytes + page_bytes_ - 1) / page_bytes_;
    if (end > first) {
      visit(PageRun{PageIndex{first}, end - first});
      next_page = end;
    }
    at_bytes = end * page_bytes_;
  }
  // A file that shrank during the walk shows holes where data was.
  return unchanged();
}

}  // namespace vmigrate::memory
