#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "vm/event_loop.hpp"
#include "vm/mapping.hpp"
#include "vm/memory.hpp"
#include "vm/preload_socket.hpp"

namespace vmigrate::pager {

///   kWaiting --hello--> kAttached --last byte mapped--> kComplete --process ended--> kGone
///      |                    |-- process ended --> kGone
///      `-----refusal--------´--> kRefused
/// kWaiting: only the socket exists. kAttached: pid and descriptors are known, ranges grow. kComplete: pid,
/// descriptors and ranges are final and memory() may be used. kGone and kRefused are final. memory() of a VM
/// that was complete stays valid, but its process no longer answers.
enum class VmState : uint32_t { kWaiting = 1, kAttached, kComplete, kGone, kRefused };

/// What must be saved to find the VM again after a restart of this process.
struct VmSnapshot {
  VmState state = VmState::kWaiting;
  pid_t pid = -1;
  struct Descriptor {
    int number_in_vm = -1;
    wire::PreloadDescriptor kind = wire::PreloadDescriptor::kSync;
  };
  std::vector<Descriptor> descriptors;
  std::vector<MappedRange> ranges;
  std::optional<Error> failure;  ///< why the state is kRefused
};

struct PreloadOptions {
  std::string socket_path;
  std::vector<RegionFileConfig> regions;
  /// Register each range for missing and minor faults before the preload's mapping call returns.
  bool incoming = false;
  /// The user of the QEMU. Not set: that of this process.
  std::optional<uid_t> peer_uid = std::nullopt;
};

/// The agent's half of the preload handshake for one QEMU. Thread-safe; its work is done on
/// EventLoop::shared(). That thread calls `on_edge` when state() has changed; `on_edge` must neither block
/// nor call back into the listener.
class PreloadListener {
 public:
  static Result<std::unique_ptr<PreloadListener>> listen(PreloadOptions options,
                                                         std::function<void()> on_edge);
  /// Reattaches to a running QEMU: takes duplicates of its descriptors again. Everything in `snapshot` is
  /// checked against the kernel: the descriptors must be userfaultfds and the ranges must be mappings of the
  /// region files. Another process that has inherited the pid is therefore noticed (kProcessGone or
  /// kRegionChanged). The listener starts as kComplete.
  static Result<std::unique_ptr<PreloadListener>> adopt(const VmSnapshot& snapshot,
                                                        std::vector<RegionFileConfig> regions,
                                                        std::function<void()> on_edge);
  /// Closes our descriptors and removes the socket. QEMU keeps its own descriptors.
  ~PreloadListener();
  PreloadListener(const PreloadListener&) = delete;
  PreloadListener& operator=(const PreloadListener&) = delete;

  VmSnapshot snapshot() const;
  /// nullptr until the VM is complete. After that it does not change, and it is valid as long as this object.
  const VmMemory* memory() const;
  /// From now on QEMU's malloc_trim does nothing for so long; 0: it works again. Only for a VM that this
  /// listener has heard the hello of: the connection of an adopted one is lost, and its malloc_trim works.
  /// What does not reach QEMU costs time, nothing else, so there is no result.
  void hold_trim(uint32_t hold_ms) const;

 private:
  PreloadListener(PreloadOptions options, std::function<void()> on_edge, std::shared_ptr<EventLoop> loop);

  struct Peer {
    PreloadPeer socket;
    EventLoop::WatchId watch = 0;
  };

  /// Runs on the loop's thread. Calls `step` with mutex_ held, then on_edge_ without it if the state has
  /// changed.
  void handle(const std::function<void()>& step);

  // Call these with mutex_ held, on the loop's thread or while the loop is paused.
  Status start_listening();
  void on_connection();
  void on_record(int connection);
  Status take_hello(const Peer& peer, PreloadRecord& record, const wire::PreloadHello& hello);
  Status take_region(const wire::PreloadRegion& message);
  Status register_stripes(const std::vector<MappedRange>& stripes) const;
  Status watch_process(UniqueFd pidfd);
  void keep_only(int connection);
  void drop_peer(int connection);
  void stop_listening();
  void refuse(int connection, const Error& error);
  void change(VmState state);

  const PreloadOptions options_;
  const std::function<void()> on_edge_;
  const std::shared_ptr<EventLoop> loop_;

  mutable std::mutex mutex_;
  VmState state_ = VmState::kWaiting;
  bool was_complete_ = false;
  bool has_changed_ = false;  ///< on_edge_ must be called
  std::optional<Error> failure_;
  VmMemory memory_;
  UniqueFd listener_;
  EventLoop::WatchId listener_watch_ = 0;
  /// Before the hello: every connection. After it: only the one that sent the hello.
  std::vector<Peer> peers_;
  UniqueFd pidfd_;
  EventLoop::WatchId pid_watch_ = 0;
};

}  // namespace vmigrate::pager
