#pragma once

// An in-memory source and connections to it. A test can hold completions back, release them in another order,
// fail them, and cut the connection.

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "base/check.hpp"
#include "transport/transport.hpp"

namespace vmigrate::test {

/// Files that endpoints read from, by key.
class FakeSource {
 public:
  transport::RemoteKey expose(int fd, uint64_t length_bytes) {
    const std::lock_guard lock(mutex_);
    const uint64_t key = next_key_++;
    files_[key] = fd;
    return {.address = 0, .key = key, .length_bytes = length_bytes};
  }
  /// Keys end with their session: after a reconnect the old keys are refused.
  void forget_all() {
    const std::lock_guard lock(mutex_);
    files_.clear();
  }
  int file(uint64_t key) {
    const std::lock_guard lock(mutex_);
    const auto found = files_.find(key);
    return found == files_.end() ? -1 : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<uint64_t, int> files_;
  uint64_t next_key_ = 100;
};

/// The test's control of one endpoint. It is shared, because the session owns and destroys the endpoint
/// itself.
struct FakeControl {
  /// Decides about an operation when it would complete. By default the operation completes.
  enum class Verdict { kComplete, kHold };
  using Judge = std::function<Verdict(const transport::Operation&)>;

  std::mutex mutex;
  std::deque<transport::Operation> waiting;
  Judge judge = [](const transport::Operation&) { return Verdict::kComplete; };
  std::function<transport::OpResult(const transport::Operation&)> result = [](const transport::Operation&) {
    return transport::OpResult::kOk;
  };
  bool cut = false;
  bool reverse = false;
  bool destroyed = false;
  size_t capacity = wire::kOutstandingOpsMax;
  uint64_t posted_count = 0;
  int event_fd = -1;

  void kick() {
    const uint64_t one = 1;
    if (event_fd >= 0) (void)!::write(event_fd, &one, sizeof(one));
  }
  void hold_all() {
    const std::lock_guard lock(mutex);
    judge = [](const transport::Operation&) { return Verdict::kHold; };
  }
  void hold_if(std::function<bool(const transport::Operation&)> which) {
    const std::lock_guard lock(mutex);
    judge = [which](const transport::Operation& op) {
      return which(op) ? Verdict::kHold : Verdict::kComplete;
    };
  }
  void release_all() {
    const std::lock_guard lock(mutex);
    judge = [](const transport::Operation&) { return Verdict::kComplete; };
    kick();
  }
  void fail_with(transport::OpResult outcome) {
    const std::lock_guard lock(mutex);
    result = [outcome](const transport::Operation&) { return outcome; };
    kick();
  }
  void disconnect() {
    const std::lock_guard lock(mutex);
    cut = true;
    kick();
  }
  /// Number of waiting operations that are held back. An operation that was merely not processed yet does not
  /// count.
  size_t held_count() {
    const std::lock_guard lock(mutex);
    return static_cast<size_t>(std::count_if(waiting.begin(), waiting.end(),
                                             [this](const auto& op) { return judge(op) == Verdict::kHold; }));
  }
  bool was_destroyed() {
    const std::lock_guard lock(mutex);
    return destroyed;
  }
};

class FakeEndpoint final : public transport::Endpoint {
 public:
  FakeEndpoint(FakeSource& source, std::shared_ptr<FakeControl> control)
      : source_(source), control_(std::move(control)), event_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    const std::lock_guard lock(control_->mutex);
    control_->event_fd = event_fd_;
  }
  ~FakeEndpoint() override {
    const std::lock_guard lock(control_->mutex);
    control_->event_fd = -1;
    control_->destroyed = true;
    ::close(event_fd_);
  }

  Result<transport::LocalId> register_local(const transport::LocalMemory& memory) override {
    locals_.push_back(memory);
    return static_cast<transport::LocalId>(locals_.size() - 1);
  }

  transport::PostResult read(std::span<const transport::Operation> operations) override {
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
  transport::PostResult write(std::span<const transport::Operation>) override {
    return {0, transport::PostStatus::kDisconnected};
  }

  size_t poll(std::span<transport::Completion> out) override {
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
  transport::PostStatus send(std::span<const std::byte>) override {
    return transport::PostStatus::kDisconnected;
  }
  size_t receive(std::span<std::byte>) override { return 0; }
  bool disconnected() const override {
    const std::lock_guard lock(control_->mutex);
    return control_->cut;
  }
  int event_fd() const override { return event_fd_; }

 private:
  transport::Completion perform(const transport::Operation& op) {
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

  FakeSource& source_;
  std::shared_ptr<FakeControl> control_;
  int event_fd_;
  std::vector<transport::LocalMemory> locals_;
};

}  // namespace vmigrate::test
