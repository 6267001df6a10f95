#pragma once

#include <array>
#include <memory>

#include "transport/shm/region.hpp"
#include "transport/stream/endpoint.hpp"

namespace vmigrate::transport {

/// The requester's side of shm. The caller's thread copies the bytes of an operation when it posts the
/// operation; only the first operation on a key waits for the key's file.
class ShmEndpoint final : public StreamEndpoint {
 public:
  ShmEndpoint(SocketStream socket, ConnectionTags no_tags);
  size_t poll(std::span<Completion> out) override;

 private:
  enum class KeyState : uint8_t { kFree = 0, kAsked, kOpen };
  struct Key {
    KeyState state = KeyState::kFree;
    uint64_t key = 0;
    ShmRegion region;
  };
  static constexpr size_t kPassedFdsMax = 4;

  PostResult post(OperationTable::Kind kind, std::span<const Operation> operations) override;
  Key* find_or_ask(uint64_t key, bool* refused);
  void execute(uint8_t slot, const Key& key);
  void execute_waiting();
  void receive_some() override;
  bool can_move_on() const override;
  ssize_t receive_frames(std::span<std::byte> out);
  void parse();
  bool accept_map_reply(const ShmMapReply& reply);
  void finish_waiting(uint64_t key, OpResult result);
  bool load_payload(uint8_t, std::span<std::byte>) override { return false; }
  void frame_sent(uint8_t) override {}

  uint32_t polls_without_receive_ = 0;

  std::array<Key, kKeysMax> keys_;
  size_t last_key_ = 0;       ///< where the last search ended; most operations go to the same region
  size_t waiting_count_ = 0;  ///< operations in kPosted, whose key is still requested or has just arrived

  std::array<UniqueFd, kPassedFdsMax> passed_fds_;  ///< arrived, not yet claimed by their frame; oldest first
  size_t passed_fd_count_ = 0;
  size_t staged_bytes_ = 0;
  std::array<std::byte, wire::kFrameHeaderBytes + wire::kMessageBytesMax> staging_;
  std::unique_ptr<std::byte[]> bounce_;
};

}  // namespace vmigrate::transport
