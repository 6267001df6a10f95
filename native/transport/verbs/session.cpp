#include "transport/verbs/session.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <system_error>

#include "base/check.hpp"
#include "transport/credentials.hpp"
#include "transport/frames.hpp"
#include "transport/memory_access.hpp"
#include "transport/verbs/listener.hpp"

namespace vmigrate::transport {

VerbsSession::VerbsSession(VerbsListener& listener, const DeviceTraits& traits,
                           const Credentials& credentials, const VerbsOptions& options,
                           MessageHandler handler, void* context)
    : listener_(listener),
      traits_(traits),
      credentials_(credentials),
      options_(options),
      handler_(handler),
      context_(context) {}

Result<std::unique_ptr<VerbsSession>> VerbsSession::start(VerbsListener& listener, ibv_context* device,
                                                          const DeviceTraits& traits,
                                                          const Credentials& credentials,
                                                          const VerbsOptions& options, MessageHandler handler,
                                                          void* context) {
  std::unique_ptr<VerbsSession> session(
      new VerbsSession(listener, traits, credentials, options, handler, context));
  session->wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!session->wake_.valid()) return system_error("eventfd");
  session->pd_.reset(verbs().ibv.alloc_pd(device));
  if (session->pd_ == nullptr) return system_error("allocate protection domain");
  auto completions = open_completion_channel(device);
  if (!completions) return completions.error();
  session->completions_ = std::move(completions).value();
  try {
    session->thread_ = std::thread([raw = session.get()] { raw->run(); });
  } catch (const std::system_error& error) {
    return system_error("start session thread", error.code().value());
  }
  if (::pthread_getcpuclockid(session->thread_.native_handle(), &session->cpu_clock_) != 0)
    session->cpu_clock_ = -1;
  return session;
}

VerbsSession::~VerbsSession() {
  // After this the listener's thread cannot bring another connection.
  listener_.forget(*this);
  stop_.store(true, std::memory_order_relaxed);
  if (wake_.valid()) (void)::eventfd_write(wake_.get(), 1);
  if (thread_.joinable()) thread_.join();
  // Queue pairs are destroyed before the registrations they use, and those before their protection domain.
  connections_.clear();
  keys_.clear();
}

Result<RemoteKey> VerbsSession::expose(const LocalMemory& memory, Access access) {
  if (auto described = MemoryAccess::describe(memory); !described) return described.error();
  const std::lock_guard one_at_a_time(expose_mutex_);
  {
    const std::lock_guard lock(mutex_);
    if (keys_.size() == kKeysMax)
      return Error{ErrorCode::kInvalidArgument, 0, "session has no room for another key"};
  }
  int rights = IBV_ACCESS_REMOTE_READ;
  // Verbs require the local right if the remote right is given.
  if (access == Access::kReadWrite) rights |= IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_LOCAL_WRITE;
  auto registered = RegisteredMemory::create(pd_.get(), memory.base, memory.length_bytes, rights, traits_);
  if (!registered) return registered.error();
  const std::lock_guard lock(mutex_);
  Key entry{random_key(), access, std::move(registered).value()};
  while (find(entry.key) != nullptr) entry.key = random_key();
  keys_.push_back(std::move(entry));
  return RemoteKey{0, keys_.back().key, memory.length_bytes};
}

const VerbsSession::Key* VerbsSession::find(uint64_t key) const {
  const auto found =
      std::find_if(keys_.begin(), keys_.end(), [key](const Key& entry) { return entry.key == key; });
  return found == keys_.end() ? nullptr : &*found;
}

PostStatus VerbsSession::send(Channel channel, std::span<const std::byte> message) {
  VMG_CHECK(!message.empty() && message.size() <= wire::kMessageBytesMax);
  const std::lock_guard lock(mutex_);
  const auto newest =
      std::find_if(connections_.rbegin(), connections_.rend(), [channel](const auto& connection) {
        return connection->channel() == channel && !connection->is_lost();
      });
  if (newest == connections_.rend()) return PostStatus::kDisconnected;
  VerbsConnection& connection = **newest;
  if (!connection.send_room()) {
    connection.progress();
    if (connection.has_frame()) (void)::eventfd_write(wake_.get(), 1);
    if (connection.is_lost()) return PostStatus::kDisconnected;
    if (!connection.send_room()) return PostStatus::kWouldBlock;
  }
  const wire::FrameHeader header = message_header(message.size());
  connection.send(std::as_bytes(std::span(&header, 1)), message);
  return connection.is_lost() ? PostStatus::kDisconnected : PostStatus::kPosted;
}

ExposedSessionCounters VerbsSession::counters() const {
  ExposedSessionCounters counters;
  timespec time{};
  // The id stays valid until the join in the destructor.
  if (::clock_gettime(cpu_clock_, &time) == 0)
    counters.cpu_ns =
        static_cast<uint64_t>(time.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(time.tv_nsec);
  const std::lock_guard lock(mutex_);
  counters.connections =
      static_cast<uint64_t>(std::count_if(connections_.begin(), connections_.end(),
                                          [](const auto& connection) { return !connection->is_lost(); }));
  return counters;
}

wire::HelloStatus VerbsSession::adopt(CmId& id, const VerbsConnection::Request& request) {
  const std::lock_guard lock(mutex_);
  reap_lost();
  if (connections_.size() >= kConnectionsMax) {
    const auto oldest = std::find_if(connections_.begin(), connections_.end(), [&](const auto& connection) {
      return connection->channel() == request.channel;
    });
    if (oldest == connections_.end()) return wire::HelloStatus::kBusy;
    connections_.erase(oldest);
  }
  auto connection =
      VerbsConnection::accept(id, pd_.get(), traits_, completions_.get(), request, options_, wake_.get());
  if (!connection) return wire::HelloStatus::kBusy;
  connections_.push_back(std::move(connection).value());
  return wire::HelloStatus::kOk;
}

void VerbsSession::reap_lost() {
  std::erase_if(connections_, [](const auto& connection) { return connection->is_lost(); });
}

void VerbsSession::run() {
  Message message;
  while (!stop_.load(std::memory_order_relaxed)) {
    sleep();
    // The handler is called without the lock: it may send.
    while (!stop_.load(std::memory_order_relaxed) && take_message(&message)) {
      if (handler_ != nullptr)
        handler_(context_, message.channel, {message.bytes.data(), message.length_bytes});
    }
  }
}

void VerbsSession::sleep() {
  pollfd entries[] = {{completions_->fd, POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  if (::poll(entries, 2, -1) <= 0) return;
  eventfd_t ignored = 0;
  if (entries[1].revents != 0) (void)::eventfd_read(wake_.get(), &ignored);
  const std::lock_guard lock(mutex_);
  if (entries[0].revents != 0) take_completion_events();
  reap_lost();
}

// Destroying a queue also removes its events, and queues are destroyed under the lock that we hold. So the
// connection of an event exists.
void VerbsSession::take_completion_events() {
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  while (verbs().ibv.get_cq_event(completions_.get(), &queue, &context) == 0)
    static_cast<VerbsConnection*>(context)->completion_event();
}

// Handles the frames that have arrived until one is a message. False: none is left.
bool VerbsSession::take_message(Message* message) {
  const std::lock_guard lock(mutex_);
  for (const auto& connection : connections_) {
    connection->progress();
    while (connection->has_frame()) {
      const auto frame = connection->first_frame();
      const VerbsFrame kind = kind_of(frame);
      if (kind == VerbsFrame::kMessage) {
        const auto body = message_in(frame);
        message->channel = connection->channel();
        message->length_bytes = body.size();
        std::memcpy(message->bytes.data(), body.data(), body.size());
        connection->drop_first_frame();
        return true;
      }
      if (kind != VerbsFrame::kMap) {
        connection->lost();
        break;
      }
      // A peer that asks faster than it takes our answers waits until it has taken one.
      if (!connection->send_room()) break;
      VerbsMap question;
      std::memcpy(&question, frame.data(), sizeof question);
      connection->drop_first_frame();
      answer_map(*connection, question);
    }
  }
  return false;
}

void VerbsSession::answer_map(VerbsConnection& connection, const VerbsMap& question) {
  VerbsMapReply reply{};
  reply.op = static_cast<uint8_t>(VerbsOp::kMapReply);
  reply.key = question.key;
  const Key* key = find(question.key);
  std::span<const uint32_t> rkeys;
  if (key == nullptr) {
    reply.status = static_cast<uint8_t>(wire::OpStatus::kBadKey);
  } else {
    const ChunkedKeys& chunks = key->memory->remote();
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.access = static_cast<uint8_t>(key->access);
    reply.chunk_count = static_cast<uint32_t>(chunks.keys.size());
    reply.length = chunks.length_bytes;
    reply.chunk_bytes = chunks.chunk_bytes;
    reply.address = chunks.address;
    rkeys = chunks.keys;
  }
  connection.send(std::as_bytes(std::span(&reply, 1)), std::as_bytes(rkeys));
}

}  // namespace vmigrate::transport
