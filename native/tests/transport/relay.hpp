#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "base/unique_fd.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

using Bytes = std::vector<std::byte>;
enum class Way : uint8_t { kToSource = 0, kToTarget = 1 };

/// Somebody in the middle of a tcp connection with Security::kIntegrity or kEncrypt. He passes the hello on,
/// then every frame, or record of TLS, as `alter` says, in pieces of random length if `cuts` is set. He does
/// not have the token.
class Relay {
 public:
  /// What is sent instead of `frame`, the number `index` of its way. Called on the relay's thread.
  using Alter = std::function<std::vector<Bytes>(Way way, size_t index, const Bytes& frame)>;
  struct Options {
    Alter alter = {};
    /// Changes the bytes of the hello, both messages of each way.
    std::function<void(Way way, Bytes& bytes)> alter_hello = {};
    bool cuts = false;
    bool is_encrypted = false;
    uint64_t seed = 1;
  };

  Relay(const Address& source, Options options);
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  /// Where the target connects to.
  Address address() const { return address_; }
  /// All frames that came, as they came.
  std::vector<Bytes> recorded(Way way) const;

 private:
  struct Stream {
    Bytes waiting;
    size_t hello_bytes_left = 0;
    std::vector<Bytes> frames;
  };

  void run();
  bool pass(Way way);
  bool send_pieces(Way way, const Bytes& bytes);
  size_t frame_bytes(Way way, const Bytes& waiting) const;

  const Address source_;
  const Options options_;
  std::mt19937_64 random_;
  UniqueFd listening_;
  Address address_;
  std::array<UniqueFd, 2> to_;  ///< by Way: where its bytes go
  std::array<Stream, 2> streams_;
  mutable std::mutex mutex_;  ///< guards Stream::frames
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace vmigrate::transport
