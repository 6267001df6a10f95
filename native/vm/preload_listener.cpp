#include "vm/preload_listener.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "uffd/uffd.hpp"

namespace vmigrate::pager {

namespace {

/// Limit of connections that have not sent their hello yet; a newer connection displaces the oldest.
constexpr size_t kPeersMax = 8;
/// QEMU maps each region once; a RAM layout never has more pieces than this.
constexpr size_t kRangesMax = 1024;
constexpr size_t kRecordBytesMax = std::max(sizeof(wire::PreloadHello), sizeof(wire::PreloadRegion));
constexpr uint64_t kMapTypeMask = 0x0f;

UniqueFd open_pidfd(pid_t pid) {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

Status set_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return system_error("fcntl userfaultfd");
  return ok();
}

std::vector<uint32_t> sync_indices(const VmMemory& memory) {
  std::vector<uint32_t> indices;
  for (uint32_t i = 0; i < memory.descriptors.size(); i++)
    if (memory.descriptors[i].kind == wire::PreloadDescriptor::kSync) indices.push_back(i);
  return indices;
}

bool is_known_kind(uint8_t kind) {
  return kind == static_cast<uint8_t>(wire::PreloadDescriptor::kSync) ||
         kind == static_cast<uint8_t>(wire::PreloadDescriptor::kAsyncWp);
}

}  // namespace

PreloadListener::PreloadListener(PreloadOptions options, std::function<void()> on_edge,
                                 std::shared_ptr<EventLoop> loop)
    : options_(std::move(options)), on_edge_(std::move(on_edge)), loop_(std::move(loop)) {}

PreloadListener::~PreloadListener() {
  // After all watches are removed while the loop is paused, no handler that knows this object can start.
  const auto paused = loop_->pause();
  keep_only(-1);
  stop_listening();
  loop_->unwatch(pid_watch_);
}

Result<std::unique_ptr<PreloadListener>> PreloadListener::listen(PreloadOptions options,
                                                                 std::function<void()> on_edge) {
  if (Status good = check_regions(options.regions); !good) return good.error();
  auto loop = EventLoop::shared();
  if (!loop) return loop.error();
  const auto paused = loop.value()->pause();
  std::unique_ptr<PreloadListener> self(
      new PreloadListener(std::move(options), std::move(on_edge), loop.value()));
  if (Status good = self->start_listening(); !good) return good.error();
  return self;
}

Status PreloadListener::start_listening() {
  auto listener = listen_preload(options_.socket_path, options_.peer_uid.value_or(::geteuid()));
  if (!listener) return listener.error();
  listener_ = std::move(listener).value();
  auto watch = loop_->watch(listener_.get(), [this] { handle([this] { on_connection(); }); });
  if (!watch) return watch.error();
  listener_watch_ = watch.value();
  return ok();
}

Result<std::unique_ptr<PreloadListener>> PreloadListener::adopt(const VmSnapshot& snapshot,
                                                                std::vector<RegionFileConfig> regions,
                                                                std::function<void()> on_edge) {
  if (Status good = check_regions(regions); !good) return good.error();
  if (snapshot.pid <= 0 || snapshot.descriptors.empty() ||
      snapshot.descriptors.size() > wire::kPreloadDescriptorsMax || snapshot.ranges.size() > kRangesMax)
    return Error{ErrorCode::kInvalidArgument, 0, "snapshot of a VM"};
  auto loop = EventLoop::shared();
  if (!loop) return loop.error();
  const auto paused = loop.value()->pause();
  std::unique_ptr<PreloadListener> self(
      new PreloadListener({{}, std::move(regions), false}, std::move(on_edge), loop.value()));
  VmMemory& memory = self->memory_;
  memory.pid = snapshot.pid;

  // Opens the pidfd first: everything found after that belongs to one process, whichever it is.
  UniqueFd pidfd = open_pidfd(snapshot.pid);
  if (!pidfd.valid()) return system_error("pidfd_open");
  for (const VmSnapshot::Descriptor& saved : snapshot.descriptors) {
    UniqueFd fd(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd.get(), saved.number_in_vm, 0)));
    const int system_errno = fd.valid() ? 0 : errno;
    if (!fd.valid() && system_errno != EBADF) return system_error("pidfd_getfd", system_errno);
    if (!fd.valid() || !is_userfaultfd(fd.get()))
      return Error{ErrorCode::kProcessGone, system_errno, "the process has no userfaultfd under that number"};
    memory.descriptors.push_back({std::move(fd), saved.number_in_vm, saved.kind});
  }
  for (const MappedRange& range : snapshot.ranges) {
    if (Status good = check_range(range, self->options_.regions, memory.ranges); !good) return good.error();
    if (range.descriptor_index >= memory.descriptors.size() ||
        memory.descriptors[range.descriptor_index].kind != wire::PreloadDescriptor::kSync)
      return Error{ErrorCode::kInvalidArgument, 0, "descriptor of a saved range"};
    const RegionFileConfig& region = self->options_.regions[range.region_index];
    auto file = identify(region);
    if (!file) return file.error();
    if (Status good = check_mapped(memory.pid, range, file.value(), region.is_private); !good)
      return good.error();
    memory.ranges.push_back(range);
  }
  if (!covers_all(memory.ranges, self->options_.regions))
    return Error{ErrorCode::kInvalidArgument, 0, "saved ranges do not cover the regions"};
  if (Status good = self->watch_process(std::move(pidfd)); !good) return good.error();
  self->was_complete_ = true;
  self->state_ = VmState::kComplete;
  return self;
}

VmSnapshot PreloadListener::snapshot() const {
  std::lock_guard lock(mutex_);
  VmSnapshot copy{state_, memory_.pid, {}, memory_.ranges, failure_};
  for (const UffdDescriptor& descriptor : memory_.descriptors)
    copy.descriptors.push_back({descriptor.number_in_vm, descriptor.kind});
  return copy;
}

const VmMemory* PreloadListener::memory() const {
  std::lock_guard lock(mutex_);
  return was_complete_ ? &memory_ : nullptr;
}

void PreloadListener::hold_trim(uint32_t hold_ms) const {
  std::lock_guard lock(mutex_);
  if (state_ != VmState::kComplete) return;
  for (const Peer& peer : peers_) static_cast<void>(send_trim(peer.socket.connection.get(), hold_ms));
}

void PreloadListener::handle(const std::function<void()>& step) {
  bool has_changed;
  {
    std::lock_guard lock(mutex_);
    step();
    has_changed = std::exchange(has_changed_, false);
  }
  if (has_changed && on_edge_) on_edge_();
}

void PreloadListener::change(VmState state) {
  state_ = state;
  has_changed_ = true;
}

void PreloadListener::on_connection() {
  auto accepted = accept_preload(listener_.get(), options_.peer_uid.value_or(::geteuid()));
  // We are out of descriptors or memory, so the backlog would wake this thread for ever.
  if (!accepted) return refuse(-1, accepted.error());
  PreloadPeer& socket = accepted.value();
  if (!socket.connection.valid()) return;
  const int connection = socket.connection.get();
  if (peers_.size() == kPeersMax) drop_peer(peers_.front().socket.connection.get());
  auto watch = loop_->watch(connection, [this, connection] { handle([&] { on_record(connection); }); });
  if (!watch) return refuse(-1, watch.error());
  peers_.push_back({std::move(socket), watch.value()});
}

void PreloadListener::on_record(int connection) {
  const auto peer = std::find_if(peers_.begin(), peers_.end(), [connection](const Peer& each) {
    return each.socket.connection.get() == connection;
  });
  if (peer == peers_.end()) return;
  std::byte buffer[kRecordBytesMax];
  auto received = receive_record(connection, buffer);
  if (received && received.value().is_waiting) return;
  if (!received || received.value().length_bytes == 0) {
    drop_peer(connection);
    // A complete VM no longer needs this connection; the pidfd reports its end.
    if (state_ == VmState::kAttached) change(VmState::kGone);
    return;
  }
  PreloadRecord& record = received.value();
  const bool is_whole = !record.is_cut;
  Status done = Error{ErrorCode::kProtocol, 0, "message from the preload"};
  if (record.lacks_descriptors) done = system_error("take the descriptors of QEMU", EMFILE);
  if (is_whole && state_ == VmState::kWaiting && record.length_bytes == sizeof(wire::PreloadHello)) {
    wire::PreloadHello hello;
    std::memcpy(&hello, buffer, sizeof hello);
    done = take_hello(*peer, record, hello);
  } else if (is_whole && (state_ == VmState::kAttached || state_ == VmState::kComplete) &&
             record.length_bytes == sizeof(wire::PreloadRegion)) {
    wire::PreloadRegion region;
    std::memcpy(&region, buffer, sizeof region);
    done = take_region(region);
  }
  if (!done) return refuse(connection, done.error());
  if (state_ == VmState::kWaiting) {
    keep_only(connection);
    stop_listening();
    change(VmState::kAttached);
  } else if (covers_all(memory_.ranges, options_.regions)) {
    was_complete_ = true;
    change(VmState::kComplete);
  }
  // The reply was not received because the process has died; the next event reports that.
  static_cast<void>(send_ack(connection, wire::PreloadStatus::kOk));
}

Status PreloadListener::take_hello(const Peer& peer, PreloadRecord& record, const wire::PreloadHello& hello) {
  if (hello.magic != wire::kPreloadMagic || hello.op != static_cast<uint16_t>(wire::PreloadOp::kHello))
    return Error{ErrorCode::kProtocol, 0, "hello of the preload"};
  if (hello.version != wire::kPreloadVersion) return Error{ErrorCode::kProtocol, 0, "version of the preload"};
  const size_t count = hello.descriptor_count;
  if (count == 0 || count > wire::kPreloadDescriptorsMax || record.descriptors.size() != count)
    return Error{ErrorCode::kProtocol, 0, "number of descriptors from the preload"};
  VmMemory memory;
  memory.pid = peer.socket.pid;
  for (size_t i = 0; i < count; i++) {
    const int fd = record.descriptors[i].get();
    int32_t number;
    std::memcpy(&number, hello.numbers + i * sizeof number, sizeof number);
    if (!is_known_kind(hello.kinds[i]) || number < 0 || !is_userfaultfd(fd))
      return Error{ErrorCode::kProtocol, 0, "descriptor from the preload"};
    if (Status good = set_nonblocking(fd); !good) return good;
    memory.descriptors.push_back(
        {std::move(record.descriptors[i]), number, wire::PreloadDescriptor{hello.kinds[i]}});
  }
  if (sync_indices(memory).empty())
    return Error{ErrorCode::kProtocol, 0, "no descriptor for faults from the preload"};
  UniqueFd pidfd = open_pidfd(memory.pid);
  if (!pidfd.valid()) return system_error("pidfd_open");
  if (Status good = watch_process(std::move(pidfd)); !good) return good;
  memory_ = std::move(memory);
  return ok();
}

Status PreloadListener::take_region(const wire::PreloadRegion& message) {
  if (message.magic != wire::kPreloadMagic || message.version != wire::kPreloadVersion ||
      message.op != static_cast<uint16_t>(wire::PreloadOp::kRegion))
    return Error{ErrorCode::kProtocol, 0, "region message of the preload"};
  for (uint32_t i = 0; i < options_.regions.size(); i++) {
    const RegionFileConfig& region = options_.regions[i];
    auto file = identify(region);
    if (!file) return file.error();
    if (file.value() != FileIdentity{message.device, message.inode}) continue;
    // The file of a private mapping lacks the guest's writes. The guest's writes to a shared mapping would
    // reach every other process that runs on the file.
    const uint64_t type = message.map_flags & kMapTypeMask;
    const bool is_shared = type == MAP_SHARED || type == MAP_SHARED_VALIDATE;
    if (region.is_private ? type != MAP_PRIVATE : !is_shared)
      return Error{ErrorCode::kUnsupported, 0,
                   region.is_private ? "region not mapped privately" : "region mapped privately"};
    const MappedRange mapping{i, message.file_offset, message.length, HostAddr{message.base}, 0};
    if (Status good = check_range(mapping, options_.regions, memory_.ranges); !good) return good;
    if (Status good = check_mapped(memory_.pid, mapping, file.value(), region.is_private); !good) return good;
    const auto stripes = stripe(mapping, region.page_bytes, sync_indices(memory_));
    if (memory_.ranges.size() + stripes.size() > kRangesMax)
      return Error{ErrorCode::kProtocol, 0, "too many mappings from the preload"};
    if (options_.incoming)
      if (Status good = register_stripes(stripes); !good) return good;
    memory_.ranges.insert(memory_.ranges.end(), stripes.begin(), stripes.end());
    return ok();
  }
  return Error{ErrorCode::kRegionChanged, 0, "mapped file is not a region of this VM"};
}

/// A failure half-way leaves stripes registered; the refusal makes the preload unmap all of them.
Status PreloadListener::register_stripes(const std::vector<MappedRange>& stripes) const {
  constexpr uint64_t modes =
      static_cast<uint64_t>(uffd::Mode::kMissing) | static_cast<uint64_t>(uffd::Mode::kMinor);
  for (const MappedRange& part : stripes) {
    const int fd = memory_.descriptors[part.descriptor_index].fd.get();
    const auto outcome = uffd::register_range(fd, part.base, part.length_bytes, modes);
    if (outcome.outcome != uffd::Outcome::kDone)
      return uffd::call_error(outcome.system_errno, "UFFDIO_REGISTER");
  }
  return ok();
}

Status PreloadListener::watch_process(UniqueFd pidfd) {
  auto watch = loop_->watch(pidfd.get(), [this] {
    handle([this] {
      loop_->unwatch(std::exchange(pid_watch_, 0));
      if (state_ == VmState::kAttached || state_ == VmState::kComplete) change(VmState::kGone);
    });
  });
  if (!watch) return watch.error();
  pidfd_ = std::move(pidfd);
  pid_watch_ = watch.value();
  return ok();
}

/// Refuses a request. Before the VM is complete, that ends the handshake; a complete VM runs on without what
/// was refused.
void PreloadListener::refuse(int connection, const Error& error) {
  if (connection >= 0) static_cast<void>(send_ack(connection, wire::PreloadStatus::kRefused));
  if (state_ == VmState::kComplete || state_ == VmState::kGone || state_ == VmState::kRefused) return;
  failure_ = error;
  keep_only(-1);
  stop_listening();
  memory_.descriptors.clear();
  memory_.ranges.clear();
  change(VmState::kRefused);
}

void PreloadListener::drop_peer(int connection) {
  std::erase_if(peers_, [&](const Peer& peer) {
    if (peer.socket.connection.get() != connection) return false;
    loop_->unwatch(peer.watch);
    return true;
  });
}

void PreloadListener::keep_only(int connection) {
  std::erase_if(peers_, [&](const Peer& peer) {
    if (peer.socket.connection.get() == connection) return false;
    loop_->unwatch(peer.watch);
    return true;
  });
}

void PreloadListener::stop_listening() {
  if (!listener_.valid()) return;
  loop_->unwatch(std::exchange(listener_watch_, 0));
  listener_.reset();
  ::unlink(options_.socket_path.c_str());
}

}  // namespace vmigrate::pager
