#include "transport/memory_access.hpp"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

AccessResult store_error(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:  // the memory cgroup that the page is charged to is full
      return {OpResult::kNoSpace, error};
    case EBADF:  // opened read-only
      return {OpResult::kNotAllowed, error};
    default:
      return {OpResult::kIoError, error};
  }
}

}  // namespace

Result<MemoryAccess> MemoryAccess::describe(const LocalMemory& memory) {
  const Error bad_range{ErrorCode::kInvalidArgument, 0, "memory range is impossible"};
  const bool is_mapped = memory.fd >= 0 || memory.base != nullptr;
  if (memory.length_bytes == 0 || is_mapped == (memory.reader != nullptr)) return bad_range;
  MemoryAccess access;
  access.memory_ = memory;
  if (memory.reader != nullptr) {
    access.method_ = Method::kReader;
    return access;
  }
  if (memory.fd < 0) return access;

  uint64_t end_bytes = 0;
  if (__builtin_add_overflow(memory.fd_offset_bytes, memory.length_bytes, &end_bytes) ||
      end_bytes > static_cast<uint64_t>(INT64_MAX))
    return bad_range;
  struct stat info {};
  if (::fstat(memory.fd, &info) != 0) return system_error("fstat memory file");
  if (!S_ISREG(info.st_mode)) return Error{ErrorCode::kInvalidArgument, 0, "memory is not a regular file"};
  if (static_cast<uint64_t>(info.st_size) < end_bytes)
    return Error{ErrorCode::kRegionChanged, 0, "memory file is shorter than its range"};
  struct statfs system {};
  if (::fstatfs(memory.fd, &system) != 0) return system_error("fstatfs memory file");
  const bool huge = static_cast<uint64_t>(system.f_type) == HUGETLBFS_MAGIC;
  if (huge && memory.base == nullptr)
    return Error{ErrorCode::kInvalidArgument, 0, "hugetlbfs memory needs its mapping"};
  access.method_ = huge ? Method::kMapping : Method::kFile;
  return access;
}

bool MemoryAccess::contains(uint64_t offset_bytes, uint64_t length_bytes) const {
  return length_bytes != 0 && length_bytes <= memory_.length_bytes &&
         offset_bytes <= memory_.length_bytes - length_bytes;
}

AccessResult MemoryAccess::load(uint64_t offset_bytes, std::span<std::byte> out) const {
  VMG_CHECK(contains(offset_bytes, out.size()));
  if (method_ == Method::kPlain) {
    std::memcpy(out.data(), memory_.base + offset_bytes, out.size());
    return {};
  }
  if (method_ == Method::kReader) {
    if (!memory_.reader->is_here(offset_bytes, out.size())) return {OpResult::kAbsent, 0};
    const Status status = memory_.reader->read(offset_bytes, out);
    return status ? AccessResult{} : AccessResult{OpResult::kIoError, status.error().system_errno};
  }
  uint64_t position = memory_.fd_offset_bytes + offset_bytes;
  while (!out.empty()) {
    const ssize_t count = ::pread(memory_.fd, out.data(), out.size(), static_cast<off_t>(position));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return {OpResult::kIoError, errno};
    if (count == 0) return {OpResult::kIoError, EIO};  // the file ends before the region does
    out = out.subspan(static_cast<size_t>(count));
    position += static_cast<uint64_t>(count);
  }
  return {};
}

// pwrite past the end would make a shrunken file longer again and hide that its pages are lost.
AccessResult MemoryAccess::check_file_length(uint64_t end_bytes) const {
  struct stat info {};
  if (::fstat(memory_.fd, &info) != 0) return {OpResult::kIoError, errno};
  if (static_cast<uint64_t>(info.st_size) < end_bytes) return {OpResult::kIoError, EIO};
  return {};
}

AccessResult MemoryAccess::mapped(uint64_t offset_bytes, uint64_t length_bytes,
                                  std::span<std::byte>* out) const {
  VMG_CHECK(contains(offset_bytes, length_bytes));
  *out = {};
  if (memory_.base == nullptr || method_ == Method::kMapping) return {};
  if (method_ == Method::kFile) {
    const AccessResult length = check_file_length(memory_.fd_offset_bytes + offset_bytes + length_bytes);
    if (!length.ok()) return length;
  }
  *out = {memory_.base + offset_bytes, length_bytes};
  return {};
}

AccessResult MemoryAccess::store(uint64_t offset_bytes, std::span<const std::byte> in) const {
  VMG_CHECK(contains(offset_bytes, in.size()));
  if (method_ == Method::kReader) return {OpResult::kNotAllowed, 0};
  if (method_ == Method::kPlain) {
    std::memcpy(memory_.base + offset_bytes, in.data(), in.size());
    return {};
  }
  if (method_ == Method::kFile) {
    size_t stored_bytes = 0;
    const AccessResult stored = store_from_mapping(offset_bytes, in, &stored_bytes);
    if (!stored.ok() || stored_bytes == in.size()) return stored;
    return {OpResult::kIoError, EFAULT};
  }
  const uint64_t end_bytes = memory_.fd_offset_bytes + offset_bytes + in.size();
  while (!in.empty()) {
    // Unlike a store of our own, this call returns EFAULT for a missing huge page or a shrunken file.
    iovec from{const_cast<std::byte*>(in.data()), in.size()};
    iovec to{memory_.base + offset_bytes, in.size()};
    const ssize_t count = ::process_vm_writev(::getpid(), &from, 1, &to, 1, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      const int error = count < 0 ? errno : EFAULT;
      if (error != EFAULT) return {OpResult::kIoError, error};
      const AccessResult length = check_file_length(end_bytes);
      return length.ok() ? AccessResult{OpResult::kNoSpace, error} : length;
    }
    in = in.subspan(static_cast<size_t>(count));
    offset_bytes += static_cast<uint64_t>(count);
  }
  return {};
}

AccessResult MemoryAccess::store_from_mapping(uint64_t offset_bytes, std::span<const std::byte> in,
                                              size_t* stored_bytes) const {
  VMG_CHECK(method_ == Method::kFile && contains(offset_bytes, in.size()));
  uint64_t position = memory_.fd_offset_bytes + offset_bytes;
  *stored_bytes = 0;
  if (const AccessResult length = check_file_length(position + in.size()); !length.ok()) return length;
  while (!in.empty()) {
    const ssize_t count =
        ::pwrite(memory_.fd, in.data(), std::min(in.size(), kStoreBytesMax), static_cast<off_t>(position));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EFAULT) return {};
    if (count < 0) return store_error(errno);
    if (count == 0) return {OpResult::kIoError, EIO};
    in = in.subspan(static_cast<size_t>(count));
    position += static_cast<uint64_t>(count);
    *stored_bytes += static_cast<size_t>(count);
  }
  return {};
}

}  // namespace vmigrate::transport
