#include "source/clone_region.hpp"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>

#include "base/inject_point.hpp"
#include "base/page_key.hpp"

namespace vmigrate::pager {
namespace {

constexpr uint64_t kOwnPageBytes = wire::kPageBytesMin;
/// Bytes of the clone's own pages that are kept at once.
constexpr uint64_t kKeepBytes = 256 << 10;
constexpr const char* kUnfinished = ".part";

/// Transfers the whole span or returns an error: the range lies inside the file, unless another process has
/// shortened the file.
Status read_file(int fd, uint64_t offset_bytes, std::span<std::byte> out, const char* what) {
  while (!out.empty()) {
    const ssize_t count = ::pread(fd, out.data(), out.size(), static_cast<off_t>(offset_bytes));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return system_error(what);
    if (count == 0) return Error{ErrorCode::kRegionChanged, EIO, what};
    out = out.subspan(static_cast<size_t>(count));
    offset_bytes += static_cast<uint64_t>(count);
  }
  return ok();
}

Status write_file(int fd, uint64_t offset_bytes, std::span<const std::byte> in) {
  while (!in.empty()) {
    const ssize_t count = ::pwrite(fd, in.data(), in.size(), static_cast<off_t>(offset_bytes));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return system_error("write a clone's own pages");
    in = in.subspan(static_cast<size_t>(count));
    offset_bytes += static_cast<uint64_t>(count);
  }
  return ok();
}

Status remove_file(const std::string& path) {
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return ok();
  return system_error("unlink a clone's own pages");
}

}  // namespace

CloneRegion::CloneRegion(const memory::Region& image, uint32_t region_index, const ProcessMemory* process,
                         std::string own_path)
    : image_(image), region_index_(region_index), process_(process), own_path_(std::move(own_path)) {
  own_.resize((image.length_bytes() / kOwnPageBytes + 63) / 64);
}

Result<std::unique_ptr<CloneRegion>> CloneRegion::open(const memory::Region& image, uint32_t region_index,
                                                       const ProcessMemory* process, std::string own_path,
                                                       bool resume) {
  std::unique_ptr<CloneRegion> region(new CloneRegion(image, region_index, process, std::move(own_path)));
  if (!resume) {
    if (auto status = remove_file(region->own_path_); !status) return status.error();
  } else if (auto status = region->take_over(); !status) {
    return status.error();
  }
  const bool is_kept = region->stage_.load(std::memory_order_relaxed) == Stage::kKept;
  if (!is_kept && process == nullptr)
    return Error{ErrorCode::kProcessGone, 0, "a clone exited and its own pages are in no file"};
  return region;
}

Status CloneRegion::take_over() {
  UniqueFd fd(::open(own_path_.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!fd.valid()) return errno == ENOENT ? ok() : Status(system_error("open a clone's own pages"));
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return system_error("fstat a clone's own pages");
  if (static_cast<uint64_t>(file.st_size) != image_.length_bytes() + bits_bytes())
    return Error{ErrorCode::kRegionChanged, 0, "the file of a clone's own pages has another length"};
  const auto bits = std::as_writable_bytes(std::span(own_));
  if (auto read = read_file(fd.get(), image_.length_bytes(), bits, "read a clone's own pages"); !read)
    return read;
  uint64_t pages = 0;
  for (const uint64_t word : own_) pages += static_cast<uint64_t>(std::popcount(word));
  own_pages_.store(pages, std::memory_order_relaxed);
  kept_pages_.store(pages, std::memory_order_relaxed);
  own_fd_ = std::move(fd);
  // R16 pairs with A16 in read: bits and descriptor before the stage.
  stage_.store(Stage::kKept, std::memory_order_release);
  return ok();
}

Status CloneRegion::look() {
  if (stage_.load(std::memory_order_relaxed) != Stage::kUnknown) return ok();
  uint64_t pages = 0;
  const Status walked =
      process_->each_own_run(region_index_, 0, image_.length_bytes(), [this, &pages](PageRun run) {
        for (uint64_t page = raw(run.first); page < raw(run.first) + run.count; ++page)
          own_[page / 64] |= uint64_t{1} << page % 64;
        pages += run.count;
      });
  if (!walked) return walked;
  if (auto whole = process_->whole(); !whole) return whole;
  own_pages_.store(pages, std::memory_order_relaxed);
  // R16 pairs with A16 in read: the bits before the stage.
  stage_.store(Stage::kKnown, std::memory_order_release);
  return ok();
}

Status CloneRegion::keep(const std::atomic<bool>& stop) {
  if (stage_.load(std::memory_order_relaxed) != Stage::kKnown) return ok();
  const std::string unfinished = own_path_ + kUnfinished;
  UniqueFd fd(::open(unfinished.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return system_error("create a file for a clone's own pages");
  Status status = ok();
  if (::ftruncate(fd.get(), static_cast<off_t>(image_.length_bytes() + bits_bytes())) != 0)
    status = system_error("ftruncate a clone's own pages");
  if (status) status = copy_own(fd.get(), stop);
  if (status) status = process_->whole();
  const bool is_whole = status.ok() && !stop.load(std::memory_order_relaxed);
  if (is_whole) status = write_file(fd.get(), image_.length_bytes(), std::as_bytes(std::span(own_)));
  if (is_whole && status) {
    own_fd_ = std::move(fd);
    // R16 pairs with A16 in read: bytes and descriptor before the stage. And the stage before the name: a
    // process that sees the file may end the clone's process.
    stage_.store(Stage::kKept, std::memory_order_release);
    if (::rename(unfinished.c_str(), own_path_.c_str()) != 0)
      status = system_error("rename a clone's own pages");
  }
  if (is_whole && status) return ok();
  // The file itself may have used up the missing space, and its content is of no use to the next daemon.
  kept_pages_.store(0, std::memory_order_relaxed);
  (void)::unlink(unfinished.c_str());
  return status;
}

Status CloneRegion::copy_own(int fd, const std::atomic<bool>& stop) {
  std::vector<std::byte> buffer(kKeepBytes);
  return each_own_run(Stage::kKnown, 0, image_.length_bytes(), [&](uint64_t begin, uint64_t end) {
    while (begin < end && !stop.load(std::memory_order_relaxed)) {
      inject_point(wire::InjectPoint::kSourceKeep, page_key(region_index_, PageIndex{begin / kOwnPageBytes}));
      const std::span part = std::span(buffer).first(std::min<uint64_t>(buffer.size(), end - begin));
      if (auto read = read_own(Stage::kKnown, begin, part); !read) return read;
      if (auto written = write_file(fd, begin, part); !written) return written;
      kept_pages_.fetch_add(part.size() / kOwnPageBytes, std::memory_order_relaxed);
      begin += part.size();
    }
    return ok();
  });
}

Status CloneRegion::each_used_run(const std::function<void(PageRun)>& visit) const {
  const uint64_t page_bytes = image_.page_bytes();
  std::vector<bool> used(image_.page_count());
  const Status walked = image_.each_data_run([&](PageRun run) {
    std::fill_n(used.begin() + static_cast<ptrdiff_t>(raw(run.first)), run.count, true);
  });
  if (!walked) return walked;
  const Status owned =
      each_own_run(Stage::kKnown, 0, image_.length_bytes(), [&](uint64_t begin, uint64_t end) {
        for (uint64_t page = begin / page_bytes; page * page_bytes < end; ++page) used[page] = true;
        return ok();
      });
  if (!owned) return owned;
  for (uint64_t page = 0; page < used.size();) {
    const uint64_t first = page;
    while (page < used.size() && used[page]) ++page;
    if (page != first) visit(PageRun{PageIndex{first}, page - first});
    while (page < used.size() && !used[page]) ++page;
  }
  return ok();
}

/// Calls `visit` with the bytes of each run, [begin, end). `visit` may fail.
template <typename Visit>
Status CloneRegion::each_own_run(Stage stage, uint64_t offset_bytes, uint64_t length_bytes,
                                 Visit visit) const {
  const uint64_t first = offset_bytes / kOwnPageBytes;
  const uint64_t end = (offset_bytes + length_bytes + kOwnPageBytes - 1) / kOwnPageBytes;
  struct {
    Visit& visit;
    const uint64_t begin_bytes, end_bytes;
    Status status = ok();
    void run(uint64_t first_page, uint64_t end_page) {
      if (status)
        status = visit(std::max(begin_bytes, first_page * kOwnPageBytes),
                       std::min(end_bytes, end_page * kOwnPageBytes));
    }
  } walk{visit, offset_bytes, offset_bytes + length_bytes};
  if (stage == Stage::kUnknown) {
    // Captures only one reference, so that nothing is allocated.
    const Status walked = process_->each_own_run(
        region_index_, first * kOwnPageBytes, (end - first) * kOwnPageBytes,
        [&walk](PageRun run) { walk.run(raw(run.first), raw(run.first) + run.count); });
    return walked ? walk.status : walked;
  }
  for (uint64_t page = first; page < end && walk.status;) {
    // A clone leaves most of its memory unchanged.
    if (page % 64 == 0 && own_[page / 64] == 0) {
      page += 64;
      continue;
    }
    const uint64_t begin = page;
    while (page < end && is_own(page)) ++page;
    if (page != begin)
      walk.run(begin, page);
    else
      ++page;
  }
  return walk.status;
}

Status CloneRegion::read_own(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const {
  if (stage == Stage::kKept) return read_file(own_fd_.get(), offset_bytes, out, "read a clone's own pages");
  return process_->read(region_index_, offset_bytes, out);
}

Status CloneRegion::read(uint64_t offset_bytes, std::span<std::byte> out) const {
  for (;;) {
    const Stage stage =
        stage_.load(std::memory_order_acquire);  // A16 pairs with R16 in look, keep, take_over
    inject_point(wire::InjectPoint::kSourceRead,
                 page_key(region_index_, PageIndex{offset_bytes / kOwnPageBytes}));
    const Status status = read_in(stage, offset_bytes, out);
    if (stage == Stage::kKept) return status;
    // Only now is it certain that the process was not losing pages meanwhile: a page that it had lost would
    // have been read from the image.
    const Status whole = process_->whole();
    if (whole) return status;
    // The clone's pages were kept meanwhile, so that its process may end.
    if (stage_.load(std::memory_order_acquire) == Stage::kKept) continue;  // A16
    lost_.store(true, std::memory_order_relaxed);
    return whole;
  }
}

Status CloneRegion::read_in(Stage stage, uint64_t offset_bytes, std::span<std::byte> out) const {
  const int image = image_.fd();
  uint64_t at = offset_bytes;  // `out` is filled up to here
  const auto rest = [&](uint64_t begin, uint64_t end) {
    return out.subspan(begin - offset_bytes, end - begin);
  };
  Status status = each_own_run(stage, offset_bytes, out.size(), [&](uint64_t begin, uint64_t end) {
    if (auto before = read_file(image, at, rest(at, begin), "read the image of a clone"); !before)
      return before;
    at = end;
    return read_own(stage, begin, rest(begin, end));
  });
  if (status) status = read_file(image, at, rest(at, offset_bytes + out.size()), "read the image of a clone");
  return status;
}

}  // namespace vmigrate::pager
