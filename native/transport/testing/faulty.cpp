#include "transport/testing/faulty.hpp"

#include <algorithm>
#include <array>

#include "base/check.hpp"
#include "transport/ready_signal.hpp"

namespace vmigrate::transport {
namespace {

/// xorshift64*: good enough to shuffle, and the same on every machine.
class Dice {
 public:
  explicit Dice(uint64_t seed) : state_(seed * 2 + 1) {}
  uint64_t below(uint64_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return ((state_ * 0x2545f4914f6cdd1dull) >> 32) % bound;
  }

 private:
  uint64_t state_;
};

class FaultyEndpoint final : public Endpoint {
 public:
  FaultyEndpoint(std::unique_ptr<Endpoint> inner, const FaultyOptions& options)
      : options_(options), dice_(options.seed), inner_(std::move(inner)) {}

  Status open() {
    if (Status opened = ready_.open(); !opened) return opened;
    return ready_.watch(inner_->event_fd());
  }

  Result<LocalId> register_local(const LocalMemory& memory) override {
    return inner_->register_local(memory);
  }
  PostResult read(std::span<const Operation> operations) override { return post(operations, false); }
  PostResult write(std::span<const Operation> operations) override { return post(operations, true); }

  size_t poll(std::span<Completion> out) override {
    collect();
    const size_t count = release(out);
    ready_.set(disconnected() || any_held() || refused_);
    return count;
  }

  PostStatus send(std::span<const std::byte> message) override {
    if (disconnected()) return PostStatus::kDisconnected;
    if (storm()) return PostStatus::kWouldBlock;
    return inner_->send(message);
  }
  size_t receive(std::span<std::byte> out) override { return inner_ ? inner_->receive(out) : 0; }
  bool disconnected() const override { return inner_ == nullptr || inner_->disconnected(); }
  int event_fd() const override { return ready_.fd(); }
  bool is_device() const override { return inner_ && inner_->is_device(); }
  void set_polled(bool polled) override {
    if (inner_) inner_->set_polled(polled);
  }

 private:
  enum class State : uint8_t { kFree = 0, kPosted, kHeld };
  struct Slot {
    State state = State::kFree;
    uint64_t tag = 0;
    uint64_t number = 0;  ///< among all operations posted
    uint64_t polls_left = 0;
    uint64_t order = 0;  ///< the lowest is delivered first
    Completion completion;
  };

  bool storm() {
    refused_ = false;
    if (dice_.below(1000) >= options_.would_block_permille) return false;
    announce_retry();
    return true;
  }
  // An owner that was refused waits for event_fd. If no operation is outstanding, nothing else would ever
  // wake it, so the descriptor stays readable until the next try.
  void announce_retry() {
    refused_ = true;
    ready_.set(true);
  }
  bool any_held() const {
    return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.state == State::kHeld; });
  }

  PostResult post(std::span<const Operation> operations, bool write) {
    if (disconnected()) return {0, PostStatus::kDisconnected};
    if (operations.empty()) return {};
    if (storm()) return {0, PostStatus::kWouldBlock};
    size_t count = operations.size();
    if (options_.short_batches) count = 1 + dice_.below(count);
    PostResult result;
    while (result.posted < count) {
      const auto slot = std::find_if(slots_.begin(), slots_.end(),
                                     [](const Slot& candidate) { return candidate.state == State::kFree; });
      if (slot == slots_.end()) return {result.posted, PostStatus::kWouldBlock};
      Operation operation = operations[result.posted];
      slot->tag = operation.tag;
      operation.tag = static_cast<uint64_t>(slot - slots_.begin());
      const std::span one(&operation, 1);
      const PostResult inner = write ? inner_->write(one) : inner_->read(one);
      if (inner.posted == 0) return {result.posted, inner.status};
      slot->state = State::kPosted;
      slot->number = posted_count_++;
      ++result.posted;
      if (options_.disconnect_after_operations && posted_count_ >= *options_.disconnect_after_operations) {
        break_connection();
        if (result.posted < operations.size()) result.status = PostStatus::kDisconnected;
        return result;
      }
    }
    if (result.posted < operations.size()) {
      result.status = PostStatus::kWouldBlock;
      announce_retry();
    }
    return result;
  }

  // Operations that the inner endpoint had completed by then are done; the others never will be.
  void break_connection() {
    collect();
    inner_.reset();
    for (Slot& slot : slots_) {
      if (slot.state == State::kPosted) hold(slot, OpResult::kDisconnected, 0);
    }
    ready_.set(true);
  }

  void hold(Slot& slot, OpResult result, int system_errno) {
    if (options_.failed_operation == slot.number && result != OpResult::kDisconnected) {
      result = options_.failed_result;
      system_errno = 0;
    }
    slot.completion = Completion{slot.tag, result, system_errno};
    slot.polls_left = dice_.below(uint64_t{options_.completion_delay_polls_max} + 1);
    slot.order = options_.reorder_completions ? dice_.below(UINT32_MAX) : held_count_;
    ++held_count_;
    slot.state = State::kHeld;
  }

  void collect() {
    std::array<Completion, wire::kOutstandingOpsMax> completions;
    const size_t count = inner_ ? inner_->poll(completions) : 0;
    for (size_t i = 0; i < count; ++i) {
      VMG_CHECK(completions[i].tag < slots_.size());
      Slot& slot = slots_[completions[i].tag];
      VMG_CHECK(slot.state == State::kPosted);
      hold(slot, completions[i].result, completions[i].system_errno);
    }
  }

  size_t release(std::span<Completion> out) {
    for (Slot& slot : slots_) {
      if (slot.state == State::kHeld && slot.polls_left > 0 && !disconnected()) --slot.polls_left;
    }
    size_t count = 0;
    while (count < out.size()) {
      Slot* next = nullptr;
      for (Slot& slot : slots_) {
        const bool due = slot.state == State::kHeld && (slot.polls_left == 0 || disconnected());
        if (due && (next == nullptr || slot.order < next->order)) next = &slot;
      }
      if (next == nullptr) break;
      out[count++] = next->completion;
      next->state = State::kFree;
    }
    return count;
  }

  const FaultyOptions options_;
  Dice dice_;
  ReadySignal ready_;
  std::unique_ptr<Endpoint> inner_;  ///< nullptr after this wrapper broke the connection
  std::array<Slot, wire::kOutstandingOpsMax> slots_;
  uint64_t posted_count_ = 0;
  uint64_t held_count_ = 0;
  bool refused_ = false;  ///< whether this wrapper refused the last post or send, wholly or in part
};

}  // namespace

Result<std::unique_ptr<Endpoint>> make_faulty(std::unique_ptr<Endpoint> endpoint,
                                              const FaultyOptions& options) {
  auto faulty = std::make_unique<FaultyEndpoint>(std::move(endpoint), options);
  if (Status opened = faulty->open(); !opened) return opened.error();
  return std::unique_ptr<Endpoint>(std::move(faulty));
}

}  // namespace vmigrate::transport
