#pragma once

// An in-memory source and connections to it. A test can hold completions back, release them in another order,
// fail them, and cut the connection.

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "transport/transport.hpp"

namespace vmigrate::test {

/// Files that endpoints read from, by key.
class FakeSource {
 public:
  transport::RemoteKey expose(int fd, uint64_t length_bytes);
  /// Keys end with their session: after a reconnect the old keys are refused.
  void forget_all();
  int file(uint64_t key);

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

  FakeControl();
  ~FakeControl();
  FakeControl(const FakeControl&) = delete;
  FakeControl& operator=(const FakeControl&) = delete;

  std::mutex mutex;
  std::deque<transport::Operation> waiting;
  Judge judge;
  /// Of an operation that completes. By default kOk.
  std::function<transport::OpResult(const transport::Operation&)> result;
  bool cut = false;
  bool reverse = false;
  bool destroyed = false;
  size_t capacity = wire::kOutstandingOpsMax;
  uint64_t posted_count = 0;
  int event_fd = -1;

  void kick();
  void hold_all();
  void hold_if(std::function<bool(const transport::Operation&)> which);
  void release_all();
  void fail_with(transport::OpResult outcome);
  void disconnect();
  /// Number of waiting operations that are held back. An operation that was merely not processed yet does not
  /// count.
  size_t held_count();
  bool was_destroyed();
};

class FakeEndpoint final : public transport::Endpoint {
 public:
  FakeEndpoint(FakeSource& source, std::shared_ptr<FakeControl> control);
  ~FakeEndpoint() override;

  Result<transport::LocalId> register_local(const transport::LocalMemory& memory) override;
  transport::PostResult read(std::span<const transport::Operation> operations) override;
  transport::PostResult write(std::span<const transport::Operation>) override;
  size_t poll(std::span<transport::Completion> out) override;
  transport::PostStatus send(std::span<const std::byte>) override;
  size_t receive(std::span<std::byte>) override { return 0; }
  bool disconnected() const override;
  int event_fd() const override { return event_fd_; }

 private:
  transport::Completion perform(const transport::Operation& op);

  FakeSource& source_;
  std::shared_ptr<FakeControl> control_;
  int event_fd_;
  std::vector<transport::LocalMemory> locals_;
};

}  // namespace vmigrate::test
