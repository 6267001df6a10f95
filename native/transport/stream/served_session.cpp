#include "transport/stream/served_session.hpp"

#include <algorithm>

#include "base/check.hpp"
#include "transport/credentials.hpp"
#include "transport/stream/listener.hpp"

namespace vmigrate::transport {

ServedSession::ServedSession(StreamListener& listener, const StreamService& service,
                             const Credentials& credentials, MessageHandler handler, void* context)
    : listener_(listener),
      service_(service),
      credentials_(credentials),
      handler_(handler),
      context_(context) {}

ServedSession::~ServedSession() {
  // After this the accept thread cannot bring another connection.
  listener_.forget(*this);
  for (const auto& connection : connections_) connection->stop();
  connections_.clear();
}

Result<RemoteKey> ServedSession::expose(const LocalMemory& memory, Access access) {
  auto described = MemoryAccess::describe(memory);
  if (!described) return described.error();
  const std::lock_guard lock(mutex_);
  const size_t index = key_count_.load(std::memory_order_relaxed);
  if (index == kKeysMax) return Error{ErrorCode::kInvalidArgument, 0, "session has no room for another key"};
  ExposedKey& entry = keys_[index];
  entry.memory = described.value();
  entry.access = access;
  if (Status prepared = service_.prepare(entry); !prepared) return prepared.error();
  do {
    entry.key = random_key();
  } while (find(entry.key) != nullptr);
  // K1 pairs with K2 in find(): the entry before the count that covers it.
  key_count_.store(index + 1, std::memory_order_release);
  return RemoteKey{0, entry.key, memory.length_bytes};
}

const ExposedKey* ServedSession::find(uint64_t key) const {
  const size_t count = key_count_.load(std::memory_order_acquire);  // K2 pairs with K1 in expose()
  for (size_t i = 0; i < count; ++i) {
    if (keys_[i].key == key) return &keys_[i];
  }
  return nullptr;
}

PostStatus ServedSession::send(Channel channel, std::span<const std::byte> message) {
  VMG_CHECK(!message.empty() && message.size() <= wire::kMessageBytesMax);
  const std::lock_guard lock(mutex_);
  for (auto it = connections_.rbegin(); it != connections_.rend(); ++it) {
    if ((*it)->channel() == channel && !(*it)->finished() && !(*it)->stopping()) return (*it)->post(message);
  }
  return PostStatus::kDisconnected;
}

ExposedSessionCounters ServedSession::counters() const {
  const std::lock_guard lock(mutex_);
  ExposedSessionCounters sum = reaped_;
  for (const auto& connection : connections_) {
    sum.read_count += connection->read_count();
    sum.read_bytes += connection->read_bytes();
    sum.cpu_ns += connection->cpu_ns();
    if (!connection->finished()) ++sum.connections;
  }
  return sum;
}

void ServedSession::reap_finished() {
  std::erase_if(connections_, [this](const std::unique_ptr<ServedConnection>& connection) {
    if (!connection->finished()) return false;
    reaped_.read_count += connection->read_count();
    reaped_.read_bytes += connection->read_bytes();
    reaped_.cpu_ns += connection->cpu_ns();
    return true;
  });
}

wire::HelloStatus ServedSession::adopt(UniqueFd& socket, const Admission& admission) {
  const Channel channel = admission.agreed.channel;
  const std::lock_guard lock(mutex_);
  reap_finished();
  // Stopping connections end soon. But joining one here would wait for a message handler that may itself wait
  // for our lock. So they stay in the list until they are finished, and the list may hold twice the normal
  // number.
  if (connections_.size() >= 2 * kConnectionsMax) return wire::HelloStatus::kBusy;
  const auto live = std::count_if(connections_.begin(), connections_.end(),
                                  [](const auto& connection) { return !connection->stopping(); });
  if (static_cast<size_t>(live) >= kConnectionsMax) {
    const auto oldest = std::find_if(connections_.begin(), connections_.end(), [&](const auto& connection) {
      return !connection->stopping() && connection->channel() == channel;
    });
    if (oldest == connections_.end()) return wire::HelloStatus::kBusy;
    (*oldest)->stop();
  }
  auto connection = ServedConnection::start(std::move(socket), admission, *this, service_.serve);
  if (connection == nullptr) return wire::HelloStatus::kBusy;
  connections_.push_back(std::move(connection));
  return wire::HelloStatus::kOk;
}

}  // namespace vmigrate::transport
