#include "transport/verbs/listener.hpp"

#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "base/check.hpp"
#include "transport/hello.hpp"
#include "transport/session_lookup.hpp"
#include "transport/socket.hpp"
#include "transport/verbs/host/cm.hpp"

namespace vmigrate::transport {

Result<std::unique_ptr<Listener>> VerbsListener::start(const Address& address, const VerbsOptions& options) {
  std::unique_ptr<VerbsListener> listener(new VerbsListener(address, options));
  if (Status opened = listener->open(); !opened) return opened.error();
  try {
    listener->thread_ = std::thread([raw = listener.get()] { raw->run(); });
  } catch (const std::system_error& error) {
    return system_error("start accept thread", error.code().value());
  }
  return std::unique_ptr<Listener>(std::move(listener));
}

Status VerbsListener::open() {
  auto channel = open_event_channel();
  if (!channel) return channel.error();
  event_channel_ = std::move(channel).value();
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_.valid()) return system_error("eventfd");
  auto local = tcp_socket_address(address_);
  if (!local) return local.error();
  auto id = bind_cm_id(event_channel_.get(), local.value());
  if (!id) return id.error();
  id_ = std::move(id).value();
  auto traits = query_device(id_->verbs);
  if (!traits) return traits.error();
  traits_ = traits.value();
  if (verbs().rdma.listen(id_.get(), static_cast<int>(wire::kHelloPendingMax)) != 0)
    return system_error("listen on RDMA data port");
  address_.port = local_port(id_.get());
  return ok();
}

VerbsListener::~VerbsListener() {
  VMG_CHECK(sessions_.empty());
  stop_.store(true, std::memory_order_relaxed);
  if (wake_.valid()) (void)::eventfd_write(wake_.get(), 1);
  if (thread_.joinable()) thread_.join();
}

Result<std::unique_ptr<ExposedSession>> VerbsListener::expose_session(const Credentials& credentials,
                                                                      MessageHandler handler, void* context) {
  const std::lock_guard lock(mutex_);
  if (Status fresh = check_not_exposed(sessions_, credentials); !fresh) return fresh.error();
  auto session = VerbsSession::start(*this, id_->verbs, traits_, credentials, options_, handler, context);
  if (!session) return session.error();
  sessions_.push_back(session.value().get());
  return std::unique_ptr<ExposedSession>(std::move(session).value());
}

void VerbsListener::forget(VerbsSession& session) {
  const std::lock_guard lock(mutex_);
  std::erase(sessions_, &session);
}

void VerbsListener::run() {
  pollfd entries[] = {{event_channel_->fd, POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  while (!stop_.load(std::memory_order_relaxed)) {
    if (::poll(entries, 2, -1) > 0 && entries[0].revents != 0) take_events();
  }
}

void VerbsListener::take_events() {
  rdma_cm_event* event = nullptr;
  while (!stop_.load(std::memory_order_relaxed) &&
         verbs().rdma.get_cm_event(event_channel_.get(), &event) == 0) {
    if (event->event == RDMA_CM_EVENT_CONNECT_REQUEST) {
      CmId id(event->id);
      // The id inherits this from the listening id: its events belong to no connection until one has taken it
      // over.
      id->context = nullptr;
      const rdma_conn_param parameters = event->param.conn;
      wire::Hello hello = hello_in(private_data(parameters.private_data, parameters.private_data_len));
      // Acknowledged first, because an id cannot be destroyed while one of its events is unacknowledged.
      (void)verbs().rdma.ack_cm_event(event);
      handle_request(std::move(id), hello, parameters);
      explicit_bzero(&hello, sizeof hello);
      continue;
    }
    if (event->event == RDMA_CM_EVENT_DEVICE_REMOVAL) lost_.store(true, std::memory_order_relaxed);
    // A connection exists until its id is destroyed, and that waits for our acknowledgement. It is notified
    // without a lock, because the thread that destroys it may hold one.
    if (event->event != RDMA_CM_EVENT_ESTABLISHED && event->event != RDMA_CM_EVENT_ADDR_CHANGE &&
        event->id->context != nullptr)
      static_cast<VerbsConnection*>(event->id->context)->lost();
    (void)verbs().rdma.ack_cm_event(event);
  }
}

void VerbsListener::handle_request(CmId id, const wire::Hello& hello, const rdma_conn_param& parameters) {
  const VerbsConnection::Request request{.reads_wanted = parameters.responder_resources,
                                         .initiator_depth = parameters.initiator_depth};
  const wire::HelloReply reply = answer(id, hello, request);
  const auto status = static_cast<wire::HelloStatus>(reply.status);
  if (status == wire::HelloStatus::kOk) return;
  if (status != wire::HelloStatus::kChallenge) rejected_hellos_.fetch_add(1, std::memory_order_relaxed);
  if (id != nullptr) (void)verbs().rdma.reject(id.get(), &reply, sizeof reply);
}

// Accepts a request whose hello is right, and says why another is rejected.
wire::HelloReply VerbsListener::answer(CmId& id, const wire::Hello& hello,
                                       const VerbsConnection::Request& request) {
  if (hello.magic == wire::kHelloMagic && hello.version == wire::kOldHelloVersion) {
    wire::OldHello old;
    std::memcpy(&old, &hello, sizeof old);
    const wire::HelloStatus status = admit_old(id, old, request);
    explicit_bzero(&old, sizeof old);
    return hello_reply(status);
  }
  wire::Hello first = hello;
  std::fill(std::begin(first.proof), std::end(first.proof), uint8_t{0});
  if (const wire::HelloStatus status = check_hello(first); status != wire::HelloStatus::kOk)
    return hello_reply(status);
  if (std::memcmp(&first, &hello, sizeof hello) != 0) return hello_reply(admit(id, hello, request));
  return challenge(challenges_.add(hello, ChallengeTable::Clock::now()).source_nonce);
}

wire::HelloStatus VerbsListener::admit(CmId& id, const wire::Hello& hello, VerbsConnection::Request request) {
  // A protection domain belongs to one device, and we know only the device that we listen on.
  if (id->verbs != id_->verbs) return wire::HelloStatus::kRefused;
  // A device moves the bytes, so frames have no security.
  if (hello.security != static_cast<uint8_t>(Security::kNone)) return wire::HelloStatus::kRefused;
  const std::lock_guard lock(mutex_);
  VerbsSession* session = nullptr;
  Transcript right;
  challenges_.take(hello, ChallengeTable::Clock::now(), [&](const Transcript& transcript) {
    session = find_admitting(sessions_, transcript, hello.proof);
    right = transcript;
    return session != nullptr;
  });
  if (session == nullptr) return wire::HelloStatus::kRefused;
  Agreed agreed;
  if (!accept_hello(session->credentials().token, right, &agreed, &request.reply))
    return wire::HelloStatus::kBusy;
  request.channel = agreed.channel;
  request.reply_bytes = sizeof request.reply;
  return session->adopt(id, request);
}

wire::HelloStatus VerbsListener::admit_old(CmId& id, const wire::OldHello& hello,
                                           VerbsConnection::Request request) {
  const std::lock_guard lock(mutex_);
  VerbsSession* session = find_admitting_old(sessions_, hello);
  if (session == nullptr || id->verbs != id_->verbs) return wire::HelloStatus::kBadVersion;
  request.channel = static_cast<Channel>(hello.channel);
  request.reply = hello_reply(wire::HelloStatus::kOk);
  request.reply.version = wire::kOldHelloVersion;
  request.reply_bytes = wire::kHelloReplyHeadBytes;
  return session->adopt(id, request);
}

}  // namespace vmigrate::transport
