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
using wire::Security;

struct Credentials {
  SessionId session{};
  SessionToken token{};
  /// connect: what to ask for. expose_session: the least that a connection must ask for. Only a provider with
  /// Provider::protects_frames looks at it.
  Security security = Security::kNone;
  /// The peer speaks wire::kOldHelloVersion: its hello has the token in clear, and there is no security.
  bool old_hello = false;
};

/// Names a region that a peer exposed. Only the provider that made a key can interpret it. A key is valid as
/// long as its session.
struct RemoteKey {
  uint64_t address = 0;  ///< the region's address at the peer if a device needs it, else 0
  uint64_t key = 0;
  uint64_t length_bytes = 0;
};

/// Reads memory that no single file and no single mapping of ours shows. Any thread. A read never ends in a
/// signal.
class MemoryReader {
 public:
  virtual ~MemoryReader() = default;
  /// False: some of these bytes are not there yet, and a READ is answered with OpResult::kAbsent. Bytes that
  /// were there once stay there.
  virtual bool is_here(uint64_t /*offset_bytes*/, uint64_t /*length_bytes*/) const { return true; }
  /// Fills `out` with the bytes that start at `offset_bytes`. The range must lie inside the memory, and was
  /// there.
  virtual Status read(uint64_t offset_bytes, std::span<std::byte> out) const = 0;
};

/// Memory of ours that operations read into or write from. The provider may use the mapping, the file or
/// both, because they show the same bytes. The caller owns the memory and keeps it mapped and open until the
/// endpoint that registered it is destroyed.
struct LocalMemory {
  std::byte* base = nullptr;
  int fd = -1;                   ///< file behind `base`, -1 if none
  uint64_t fd_offset_bytes = 0;  ///< offset of `base` in the file
  uint64_t length_bytes = 0;
  /// Replaces the mapping and the file. Such memory can only be exposed read-only, and only by a provider
  /// whose threads serve it (Provider::serves_by_thread): a file can be handed out and a device can read a
  /// mapping, but neither exists here.
  const MemoryReader* reader = nullptr;
};

/// Handle of a LocalMemory on one endpoint.
enum class LocalId : uint32_t {};

/// One READ (remote to local) or WRITE (local to remote). `length_bytes` <= wire::kTransferBytesMax. The
/// transport owns the local range from post to completion.
struct Operation {
  uint64_t tag = 0;  ///< chosen by the caller, returned in the completion
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
  kDisconnected,
  kAbsent,  ///< READ: some of the bytes are not there yet (MemoryReader::is_here)
};

/// kOk means for a READ: every byte is in local memory and visible to any thread that learns of the
/// completion through acquire ordering. For a WRITE: every byte is in the peer's memory. After any other
/// result the content of the local range is undefined.
struct Completion {
  uint64_t tag = 0;
  OpResult result = OpResult::kDisconnected;
  int system_errno = 0;
};

enum class PostStatus : uint8_t { kPosted = 1, kWouldBlock, kDisconnected };
/// How much of a batch was posted: operations [0, posted). `status` says why the rest was not.
struct PostResult {
  size_t posted = 0;
  PostStatus status = PostStatus::kPosted;
};

/// The requester's side of one connection of one channel. One thread at a time uses it; this may be any
/// thread, with a happens-before between two threads. No call allocates, locks or blocks unless its comment
/// says so.
class Endpoint {
 public:
  virtual ~Endpoint() = default;

  /// May allocate. Call it before the first operation.
  virtual Result<LocalId> register_local(const LocalMemory& memory) = 0;
  /// At most wire::kOutstandingOpsMax operations are outstanding; posting more returns kWouldBlock. An
  /// operation outside its local memory breaks a CHECK.
  virtual PostResult read(std::span<const Operation> operations) = 0;
  virtual PostResult write(std::span<const Operation> operations) = 0;
  /// Never waits. Returns how many completions were written to `out`. The operations of one endpoint may
  /// complete in any order.
  virtual size_t poll(std::span<Completion> out) = 0;
  /// Sends a small message to the peer (<= wire::kMessageBytesMax).
  virtual PostStatus send(std::span<const std::byte> message) = 0;
  /// Returns the message's length; 0 if no message is waiting. A message larger than `out` is a protocol
  /// error and disconnects.
  virtual size_t receive(std::span<std::byte> out) = 0;
  virtual bool disconnected() const = 0;
  /// Becomes readable when poll, receive or disconnected may have news. Use it with epoll; never read from
  /// it.
  virtual int event_fd() const = 0;
  /// True if a device answers READs and WRITEs, not a thread of the peer. While an operation is outstanding,
  /// the owner should then poll() for a while before it sleeps, even on a host with few processors.
  virtual bool is_device() const { return false; }
  /// True: the owner calls poll() again and again, so the endpoint need not maintain event_fd, which costs
  /// system calls. False: the owner may sleep from now on, so event_fd must be correct.
  virtual void set_polled(bool /*polled*/) {}
};

struct Address {
  std::string host;  ///< IP address, or the path of a unix socket (Provider::host_is_path)
  uint16_t port = 0;
};

/// Settings of a provider beyond the address. Each provider defines its own names. An unknown name is
/// kInvalidArgument.
using OptionValue = std::variant<uint64_t, std::string>;
using Options = std::map<std::string, OptionValue>;

enum class Access : uint8_t { kRead = 1, kReadWrite };

/// Called on a provider thread for each small message that a session's peer sends. Must not block.
using MessageHandler = void (*)(void* context, Channel channel, std::span<const std::byte> message);

struct ExposedSessionCounters {
  uint64_t read_count = 0;
  uint64_t read_bytes = 0;
  uint64_t connections = 0;  ///< open now
  uint64_t cpu_ns = 0;       ///< CPU time of the threads that serve this session
};

/// The memory that the peer of one session may access. The destructor closes the session's connections and
/// waits until no provider thread touches the exposed memory; after that the caller may unmap it.
/// Thread-safe.
class ExposedSession {
 public:
  virtual ~ExposedSession() = default;
  /// `memory` stays valid until the session is destroyed. The owner of the file is not trusted and may shrink
  /// it at any time; the reader then gets kIoError, and this process gets no signal. Keys are unguessable and
  /// belong to this session alone.
  virtual Result<RemoteKey> expose(const LocalMemory& memory, Access access) = 0;
  virtual PostStatus send(Channel channel, std::span<const std::byte> message) = 0;
  virtual ExposedSessionCounters counters() const = 0;
};

/// Accepts data connections of all sessions of this host. A connection gets nothing unless it names a known
/// session and proves that it has its token within wire::kHelloTimeoutMs. Thread-safe. Must outlive its
/// sessions.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual Result<std::unique_ptr<ExposedSession>> expose_session(const Credentials& credentials,
                                                                 MessageHandler handler, void* context) = 0;
  virtual Address address() const = 0;
  virtual uint64_t rejected_hellos() const = 0;
  /// True if `expose` allocates a page behind every byte of the memory. `expose` then needs a writable
  /// mapping for either access, and the file has no holes afterwards.
  virtual bool fills_holes() const { return false; }
  /// True if the listener's device is gone. The listener and its sessions then serve nobody any more; a new
  /// listener may work.
  virtual bool lost() const { return false; }
};

/// One way to move bytes. Provider objects live for ever.
struct Provider {
  const char* name;

  /// Blocks until both ends have proved that they have the token, or `timeout` has passed. kRefused: wrong
  /// token, session, security or version. kUnsupported: this host lacks something that the provider needs,
  /// and the message names it.
  Result<std::unique_ptr<Endpoint>> (*connect)(const Address& address, const Credentials& credentials,
                                               Channel channel, std::chrono::milliseconds timeout,
                                               const Options& options);
  /// With port 0 the provider chooses a port; address() returns it.
  Result<std::unique_ptr<Listener>> (*listen)(const Address& address, const Options& options);
  /// Lists the devices of this host that the provider works with, for people and for pre-flight. nullptr: the
  /// provider needs no device. kUnsupported as for connect. Blocks for a moment.
  Result<std::vector<Device>> (*devices)() = nullptr;

  // Capabilities, and differences between providers that the contract allows.

  /// Obeys Credentials::security. Otherwise frames have none: they do not leave the host, or a device moves
  /// the bytes. The caller decides whether it may use such a provider.
  bool protects_frames = false;

  /// Addresses name a unix socket, not an IP address and a port.
  bool host_is_path = false;
  /// A thread of the source answers each READ, so the counters include it. Otherwise the counters stay 0.
  bool serves_by_thread = false;
  /// The provider hands the exposed file itself to the peer. Memory without a file therefore cannot be
  /// exposed, and a READ of a hole may fill the hole.
  bool shares_files = false;
  /// `expose` and `register_local` pin the memory, except with on-demand paging. If the file system has no
  /// room for the pages, the call fails. If the file shrinks later, the old bytes stay readable.
  bool pins_memory = false;
};

}  // namespace vmigrate::transport
