#pragma once

// The contract that every provider meets; native/tests/transport/compliance.hpp and the tests that include it
// are its executable form. A provider is a folder beside this file and a row in transport/registry.
//
// A transport moves bytes between local memory and regions that a peer has exposed. It knows nothing of
// pages, states or userfaultfd.
//
//   source: Listener --expose_session(credentials)--> ExposedSession --expose(memory, access)--> RemoteKey
//   target: Provider::connect(address, credentials, channel) --> Endpoint --read/write--> poll() -->
//   Completion
//
// Would-block and disconnect are ordinary returns. After `disconnected` an endpoint never works again:
// outstanding operations complete with kDisconnected, the owner opens a new one and posts again.

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "base/result.hpp"
#include "transport/device.hpp"

namespace vmigrate::transport {

using SessionId = std::array<uint8_t, wire::kSessionIdBytes>;
using SessionToken = std::array<uint8_t, wire::kSessionTokenBytes>;
using wire::Channel;

struct Credentials {
  SessionId session{};
  SessionToken token{};
};

/// Names a region that a peer exposed. Opaque to everyone but the provider that made it; dies with its
/// session.
struct RemoteKey {
  uint64_t address = 0;  ///< the region's address at the peer, where a device needs it; else 0
  uint64_t key = 0;
  uint64_t length_bytes = 0;
};

/// Memory that is in no one file and no one mapping of ours. Any thread; never ends in a signal.
class MemoryReader {
 public:
  virtual ~MemoryReader() = default;
  /// Fills `out` with the bytes from there on; the range lies inside the memory.
  virtual Status read(uint64_t offset_bytes, std::span<std::byte> out) const = 0;
};

/// Memory of ours that operations read into or write from. The provider may use the mapping, the file, or
/// both: they show the same bytes. Owned by the caller, who keeps it mapped and open until the endpoint that
/// registered it is destroyed.
struct LocalMemory {
  std::byte* base = nullptr;
  int fd = -1;                   ///< file behind `base`, -1 if none
  uint64_t fd_offset_bytes = 0;  ///< where `base` lies in it
  uint64_t length_bytes = 0;
  /// In place of mapping and file. Exposed read-only, and only where a thread serves it
  /// (Provider::serves_by_thread): a file can be handed out and a mapping be read by a device, this cannot.
  const MemoryReader* reader = nullptr;
};

/// Handle of a LocalMemory on one endpoint.
enum class LocalId : uint32_t {};

/// One READ (remote to local) or WRITE (local to remote). `length_bytes` <= wire::kTransferBytesMax.
/// From post to completion the local range belongs to the transport.
struct Operation {
  uint64_t tag = 0;  ///< the caller's, returned in the completion
  LocalId local{};
  uint64_t local_offset_bytes = 0;
  RemoteKey remote;
  uint64_t remote_offset_bytes = 0;
  uint32_t length_bytes = 0;
};

enum class OpResult : uint8_t {
  kOk = 1,
  kBadKey,
  kOutOfRange,
  kNotAllowed,
  kIoError,
  kNoSpace,
  kDisconnected
};

/// kOk means: for a READ, every byte is in local memory and visible to any thread that learns of it through
/// acquire ordering; for a WRITE, every byte is in the peer's memory. Any other result: the local range's
/// content is undefined.
struct Completion {
  uint64_t tag = 0;
  OpResult result = OpResult::kDisconnected;
  int system_errno = 0;
};

enum class PostStatus : uint8_t { kPosted = 1, kWouldBlock, kDisconnected };
/// How many of a batch were taken: operations [0, posted); `status` says why not more.
struct PostResult {
  size_t posted = 0;
  PostStatus status = PostStatus::kPosted;
};

/// One connection of one channel, the requester's side. One thread at a time uses it (any, with a
/// happens-before between them). No call allocates, locks or blocks, but for those that say so.
class Endpoint {
 public:
  virtual ~Endpoint() = default;

  /// May allocate; before the first operation.
  virtual Result<LocalId> register_local(const LocalMemory& memory) = 0;
  /// At most wire::kOutstandingOpsMax are under way; more would block. An operation outside its local memory
  /// breaks a CHECK.
  virtual PostResult read(std::span<const Operation> operations) = 0;
  virtual PostResult write(std::span<const Operation> operations) = 0;
  /// Never waits. Returns how many completions were written to `out`. Operations of one endpoint may complete
  /// in any order.
  virtual size_t poll(std::span<Completion> out) = 0;
  /// Small message to the peer (<= wire::kMessageBytesMax).
  virtual PostStatus send(std::span<const std::byte> message) = 0;
  /// 0: none waiting. A message larger than `out` is a protocol error and disconnects.
  virtual size_t receive(std::span<std::byte> out) = 0;
  virtual bool disconnected() const = 0;
  /// Becomes readable when poll, receive or disconnected may have news. For epoll; never read from it.
  virtual int event_fd() const = 0;
  /// READs and WRITEs are answered by a device, not by a thread of the peer: while one is under way its owner
  /// does well to poll() for a while before it sleeps, however few processors there are.
  virtual bool is_device() const { return false; }
  /// true: the owner calls poll() again and again, so event_fd need not be kept, which costs system calls.
  /// false: it may sleep from now on, and event_fd is right.
  virtual void set_polled(bool /*polled*/) {}
};

struct Address {
  std::string host;  ///< IP address, or the path of a unix socket (Provider::host_is_path)
  uint16_t port = 0;
};

/// What a provider may be told beyond an address, by names of its own. An unknown name is kInvalidArgument.
using OptionValue = std::variant<uint64_t, std::string>;
using Options = std::map<std::string, OptionValue>;

enum class Access : uint8_t { kRead = 1, kReadWrite };

/// Called with each small message a session's peer sends; from a provider thread, must not block.
using MessageHandler = void (*)(void* context, Channel channel, std::span<const std::byte> message);

struct ExposedSessionCounters {
  uint64_t read_count = 0;
  uint64_t read_bytes = 0;
  uint64_t connections = 0;  ///< open now
  uint64_t cpu_ns = 0;       ///< CPU time of the threads that serve this session
};

/// What one session's peer may reach. Destroying it closes the session's connections and waits until no
/// provider thread touches the exposed memory any more; after that the caller may unmap it. Thread-safe.
class ExposedSession {
 public:
  virtual ~ExposedSession() = default;
  /// `memory` stays valid until the session is destroyed. The file behind it may shrink under us (its owner
  /// is not trusted): that ends in kIoError at the reader, never in a signal here. Keys are unguessable and
  /// belong to this session alone.
  virtual Result<RemoteKey> expose(const LocalMemory& memory, Access access) = 0;
  virtual PostStatus send(Channel channel, std::span<const std::byte> message) = 0;
  virtual ExposedSessionCounters counters() const = 0;
};

/// Accepts data connections of all sessions of this host. A connection that shows no known session and right
/// token within wire::kHelloTimeoutMs gets nothing. Thread-safe. Must outlive its sessions.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual Result<std::unique_ptr<ExposedSession>> expose_session(const Credentials& credentials,
                                                                 MessageHandler handler, void* context) = 0;
  virtual Address address() const = 0;
  virtual uint64_t rejected_hellos() const = 0;
  /// `expose` puts a page behind every byte of the memory, and wants a mapping that may be written through,
  /// whatever the access: what were holes of its file before are none after.
  virtual bool fills_holes() const { return false; }
  /// Its device has gone. It and its sessions serve nobody any more; a new one may.
  virtual bool lost() const { return false; }
};

/// One way to move bytes. Provider objects live for ever.
struct Provider {
  const char* name;

  /// Blocks until the peer has accepted the hello or `timeout` passes. kRefused: wrong token, session or
  /// version. kUnsupported: this host lacks what it needs, and the message names it.
  Result<std::unique_ptr<Endpoint>> (*connect)(const Address& address, const Credentials& credentials,
                                               Channel channel, std::chrono::milliseconds timeout,
                                               const Options& options);
  /// Port 0 lets the provider choose; address() tells.
  Result<std::unique_ptr<Listener>> (*listen)(const Address& address, const Options& options);
  /// The devices of this host that it works with, for people and for pre-flight; nullptr: it needs none.
  /// kUnsupported as for connect. Blocks for a moment.
  Result<std::vector<Device>> (*devices)() = nullptr;

  // What it can do, and where it differs from others within the contract.

  /// Addresses name a unix socket, not an IP address and a port.
  bool host_is_path = false;
  /// A thread of the source answers each READ, so that counters know of it. Otherwise they stay 0.
  bool serves_by_thread = false;
  /// Hands the exposed file itself to the peer: memory without a file cannot be exposed, and a READ of a hole
  /// may fill it.
  bool shares_files = false;
  /// `expose` and `register_local` pin the memory (on-demand paging excepted): a file without room for its
  /// pages fails there, and a file that shrinks later still shows its old bytes.
  bool pins_memory = false;
};

}  // namespace vmigrate::transport
