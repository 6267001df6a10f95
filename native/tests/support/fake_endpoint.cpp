#include "tests/support/fake_endpoint.hpp"

#include <linux/magic.h>
#include <sys/eventfd.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.hpp"

namespace vmigrate::test {

transport::RemoteKey FakeSource::expose(int fd, uint64_t length_bytes) {
  const std::lock_guard lock(mutex_);
  const uint64_t key = next_key_++;
  files_[key] = fd;
  return {.address = 0, .key = key, .length_bytes = length_bytes};
}
void FakeSource::forget_all() {
  const std::lock_guard lock(mutex_);
  files_.clear();
}
int FakeSource::file(uint64_t key) {
  const std::lock_guard lock(mutex_);
  const auto found = files_.find(key);
  return found == files_.end() ? -1 : found->second;
}

FakeControl::FakeControl()
    : judge([](const transport::Operation&) { return Verdict::kComplete; }),
      result([](const transport::Operation&) { return transport::OpResult::kOk; }) {}
FakeControl::~FakeControl() = default;

void FakeControl::kick() {
  const uint64_t one = 1;
  if (event_fd >= 0) (void)!::write(event_fd, &one, sizeof(one));
}
void FakeControl::hold_all() {
  const std::lock_guard lock(mutex);
  judge = [](const transport::Operation&) { return Verdict::kHold; };
}
void FakeControl::hold_if(std::function<bool(const transport::Operation&)> which) {
  const std::lock_guard lock(mutex);
  judge = [which](const transport::Operation& op) { return which(op) ? Verdict::kHold : Verdict::kComplete; };
}
void FakeControl::release_all() {
  const std::lock_guard lock(mutex);
  judge = [](const transport::Operation&) { return Verdict::kComplete; };
  kick();
}
void FakeControl::fail_with(transport::OpResult outcome) {
  const std::lock_guard lock(mutex);
  result = [outcome](const transport::Operation&) { return outcome; };
  kick();
}
void FakeControl::disconnect() {
  const std::lock_guard lock(mutex);
  cut = true;
  kick();
}
size_t FakeControl::held_count() {
  const std::lock_guard lock(mutex);
  return static_cast<size_t>(std::count_if(waiting.begin(), waiting.end(),
                                           [this](const auto& op) { return judge(op) == Verdict::kHold; }));
}
bool FakeControl::was_destroyed() {
  const std::lock_guard lock(mutex);
  return destroyed;
}

FakeEndpoint::FakeEndpoint(FakeSource& source, std::shared_ptr<FakeControl> control)
    : source_(source), control_(std::move(control)), event_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  const std::lock_guard lock(control_->mutex);
  control_->event_fd = event_fd_;
}
FakeEndpoint::~FakeEndpoint() {
  const std::lock_guard lock(control_->mutex);
  control_->event_fd = -1;
  control_->destroyed = true;
  ::close(event_fd_);
}

Result<transport::LocalId> FakeEndpoint::register_local(const transport::LocalMemory& memory) {
  locals_.push_back(memory);
  return static_cast<transport::LocalId>(locals_.size() - 1);
}

transport::PostResult FakeEndpoint::read(std::span<const transport::Operation> operations) {
  const std::lock_guard lock(control_->mutex);
  if (control_->cut) return {0, transport::PostStatus::kDisconnected};
  size_t posted = 0;
  for (const transport::Operation& op : operations) {
    VMG_CHECK(op.length_bytes != 0 && op.length_bytes <= wire::kTransferBytesMax);
    const transport::LocalMemory& local = locals_.at(static_cast<size_t>(op.local));
    VMG_CHECK(op.local_offset_bytes + op.length_bytes <= local.length_bytes);
    if (control_->waiting.size() >= control_->capacity) {
      if (posted != 0) control_->kick();
      return {posted, transport::PostStatus::kWouldBlock};
    }
    control_->waiting.push_back(op);
    ++control_->posted_count;
    ++posted;
  }
  control_->kick();
  return {posted, transport::PostStatus::kPosted};
}
transport::PostResult FakeEndpoint::write(std::span<const transport::Operation>) {
  return {0, transport::PostStatus::kDisconnected};
}

size_t FakeEndpoint::poll(std::span<transport::Completion> out) {
  const std::lock_guard lock(control_->mutex);
  uint64_t count_read;
  (void)!::read(event_fd_, &count_read, sizeof(count_read));
  size_t count = 0;
  if (control_->cut) {
    while (!control_->waiting.empty() && count < out.size()) {
      out[count++] = {control_->waiting.front().tag, transport::OpResult::kDisconnected, 0};
      control_->waiting.pop_front();
    }
    control_->kick();
    return count;
  }
  std::deque<transport::Operation> held;
  if (control_->reverse) std::reverse(control_->waiting.begin(), control_->waiting.end());
  while (!control_->waiting.empty()) {
    const transport::Operation op = control_->waiting.front();
    control_->waiting.pop_front();
    if (count == out.size() || control_->judge(op) == FakeControl::Verdict::kHold) {
      held.push_back(op);
      continue;
    }
    out[count++] = perform(op);
  }
  if (count == out.size() && !held.empty()) control_->kick();
  control_->waiting = std::move(held);
  return count;
}
transport::PostStatus FakeEndpoint::send(std::span<const std::byte>) {
  return transport::PostStatus::kDisconnected;
}
bool FakeEndpoint::disconnected() const {
  const std::lock_guard lock(control_->mutex);
  return control_->cut;
}

transport::Completion FakeEndpoint::perform(const transport::Operation& op) {
  using transport::OpResult;
  const OpResult outcome = control_->result(op);
  if (outcome != OpResult::kOk) return {op.tag, outcome, 0};
  const int fd = source_.file(op.remote.key);
  if (fd < 0) return {op.tag, OpResult::kBadKey, 0};
  std::vector<std::byte> bytes(op.length_bytes);
  const ssize_t got = ::pread(fd, bytes.data(), bytes.size(), static_cast<off_t>(op.remote_offset_bytes));
  if (got != static_cast<ssize_t>(bytes.size())) return {op.tag, OpResult::kIoError, 0};
  const transport::LocalMemory& local = locals_[static_cast<size_t>(op.local)];
  if (local.fd < 0) {
    std::copy(bytes.begin(), bytes.end(), local.base + op.local_offset_bytes);
    return {op.tag, OpResult::kOk, 0};
  }
  struct statfs fs {};
  (void)::fstatfs(local.fd, &fs);
  if (fs.f_type == HUGETLBFS_MAGIC) {  // hugetlbfs has no pwrite
    std::copy(bytes.begin(), bytes.end(), local.base + op.local_offset_bytes);
    return {op.tag, OpResult::kOk, 0};
  }
  // As a transport must: a full file system gives an errno, never a signal.
  for (size_t written = 0; written < bytes.size();) {
    const ssize_t count =
        ::pwrite(local.fd, bytes.data() + written, bytes.size() - written,
                 static_cast<off_t>(local.fd_offset_bytes + op.local_offset_bytes + written));
    if (count < 0) return {op.tag, errno == ENOSPC ? OpResult::kNoSpace : OpResult::kIoError, errno};
    written += static_cast<size_t>(count);
  }
  return {op.tag, OpResult::kOk, 0};
}

}  // namespace vmigrate::test
