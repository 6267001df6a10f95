#include <poll.h>

#include <cerrno>
#include <cstring>

#include "base/check.hpp"
#include "transport/hello.hpp"
#include "transport/memory_access.hpp"
#include "transport/verbs/endpoint.hpp"
#include "transport/verbs/host/cm.hpp"

namespace vmigrate::transport {
namespace {

int left_ms(Deadline deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::max<int64_t>(0, left.count()));
}

}  // namespace

VerbsEndpoint::VerbsEndpoint(Channel channel) : channel_(channel) {}

VerbsEndpoint::~VerbsEndpoint() {
  if (qp_.get() != nullptr) (void)verbs().rdma.disconnect(id_.get());
}

Result<std::unique_ptr<Endpoint>> VerbsEndpoint::connect(const Address& address,
                                                         const Credentials& credentials, Channel channel,
                                                         Deadline deadline, const VerbsOptions& options) {
  std::unique_ptr<VerbsEndpoint> endpoint(new VerbsEndpoint(channel));
  Greeting greeting(credentials, channel, Security::kNone);
  if (!credentials.old_hello) {
    if (Status resolved = endpoint->resolve(address, options, deadline); !resolved) return resolved.error();
    if (Status asked = endpoint->ask_for_challenge(greeting, deadline); !asked) return asked.error();
  }
  // A rejected id connects no more, so another one brings the answer.
  if (Status resolved = endpoint->resolve(address, options, deadline); !resolved) return resolved.error();
  if (Status created = endpoint->create_queues(); !created) return created.error();
  wire::HelloReply reply{};
  if (credentials.old_hello) {
    wire::OldHello old = make_old_hello(credentials, channel);
    const Status said = endpoint->say_hello(std::as_bytes(std::span(&old, 1)), options, deadline, &reply);
    explicit_bzero(&old, sizeof old);
    if (!said) return said.error();
    if (Status checked = check_reply(reply, wire::HelloStatus::kOk, wire::kOldHelloVersion); !checked)
      return checked.error();
  } else {
    const auto hello = std::as_bytes(std::span(&greeting.hello(), 1));
    if (Status said = endpoint->say_hello(hello, options, deadline, &reply); !said) return said.error();
    if (const auto agreed = greeting.take_reply(reply); !agreed) return agreed.error();
  }
  // Arms the queues, so that the first sleep is safe.
  endpoint->update_ready();
  return std::unique_ptr<Endpoint>(std::move(endpoint));
}

// Our address determines device, port and GID. The address comes from the options or from the routing table.
Status VerbsEndpoint::resolve(const Address& address, const VerbsOptions& options, Deadline deadline) {
  auto channel = open_event_channel();
  if (!channel) return channel.error();
  id_ = {};  // before its channel
  event_channel_ = std::move(channel).value();
  auto id = create_cm_id(event_channel_.get(), nullptr);
  if (!id) return id.error();
  id_ = std::move(id).value();
  if (Status applied = apply_options(id_.get(), options); !applied) return applied;

  auto target = tcp_socket_address(address);
  if (!target) return target.error();
  SocketAddress local;
  if (!options.local_host.empty()) {
    auto parsed = tcp_socket_address(Address{options.local_host, 0});
    if (!parsed) return parsed.error();
    local = parsed.value();
  }
  auto* local_address = local.length == 0 ? nullptr : reinterpret_cast<sockaddr*>(&local.storage);
  auto* target_address = reinterpret_cast<sockaddr*>(&target.value().storage);
  if (verbs().rdma.resolve_addr(id_.get(), local_address, target_address, left_ms(deadline)) != 0) {
    if (errno == ENODEV) return connect_error(RDMA_CM_EVENT_ADDR_ERROR, -ENODEV, nullptr);
    return system_error("resolve RDMA address");
  }
  if (Status resolved = wait_event(RDMA_CM_EVENT_ADDR_RESOLVED, deadline); !resolved) return resolved;
  if (verbs().rdma.resolve_route(id_.get(), left_ms(deadline)) != 0)
    return system_error("resolve RDMA route");
  return wait_event(RDMA_CM_EVENT_ROUTE_RESOLVED, deadline);
}

Status VerbsEndpoint::create_queues() {
  auto domain = RequesterDomain::of(id_->verbs);
  if (!domain) return domain.error();
  domain_ = std::move(domain).value();
  if (domain_->traits().queue_entries_max < kSendQueueEntries)
    return Error{ErrorCode::kUnsupported, 0, "the RDMA device's queues are too short"};

  auto channel = open_completion_channel(id_->verbs);
  if (!channel) return channel.error();
  completion_channel_ = std::move(channel).value();
  auto send_cq = CompletionQueue::create(id_->verbs, kSendQueueEntries, nullptr, completion_channel_.get());
  if (!send_cq) return send_cq.error();
  send_cq_ = std::move(send_cq).value();
  auto receive_cq =
      CompletionQueue::create(id_->verbs, MessageBuffers::kReceiveCount, nullptr, completion_channel_.get());
  if (!receive_cq) return receive_cq.error();
  receive_cq_ = std::move(receive_cq).value();

  if (Status opened = messages_.open(domain_->pd()); !opened) return opened;
  const QueueSizes sizes{.send_entries = kSendQueueEntries, .receive_entries = MessageBuffers::kReceiveCount};
  if (Status created = create_queue_pair(id_.get(), domain_->pd(), send_cq_.get(), receive_cq_.get(), sizes,
                                         qp_, &inline_bytes_max_);
      !created)
    return created;
  if (Status posted = messages_.post_all_receives(qp_.get()); !posted) return posted;

  if (Status opened = ready_.open(); !opened) return opened;
  if (Status watched = ready_.watch(completion_channel_->fd); !watched) return watched;
  return ready_.watch(event_channel_->fd);
}

// The first request has no queue pair, and no right answer but a rejection with the challenge.
Status VerbsEndpoint::ask_for_challenge(Greeting& greeting, Deadline deadline) {
  rdma_conn_param parameters{};
  parameters.private_data = &greeting.hello();
  parameters.private_data_len = sizeof greeting.hello();
  // Some devices refuse zeros.
  parameters.initiator_depth = 1;
  parameters.responder_resources = 1;
  parameters.qp_num = 1;
  if (verbs().rdma.connect(id_.get(), &parameters) != 0) return system_error("ask RDMA peer for a challenge");
  wire::HelloReply reply{};
  if (Status rejected = wait_event(RDMA_CM_EVENT_REJECTED, deadline, &reply); !rejected) return rejected;
  return greeting.take_challenge(reply);
}

Status VerbsEndpoint::say_hello(std::span<const std::byte> hello, const VerbsOptions& options,
                                Deadline deadline, wire::HelloReply* reply) {
  rdma_conn_param parameters{};
  parameters.private_data = hello.data();
  parameters.private_data_len = static_cast<uint8_t>(hello.size());
  // The number that we request. The peer's device may grant less, and the connection manager sets the smaller
  // of the two.
  parameters.initiator_depth = domain_->traits().reads_as_requester_max;
  // The source never reads from us, but some devices refuse a zero.
  parameters.responder_resources = 1;
  parameters.retry_count = options.retry_count;
  parameters.rnr_retry_count = options.rnr_retry_count;
  if (verbs().rdma.connect(id_.get(), &parameters) != 0) return system_error("connect to RDMA peer");
  if (Status up = wait_event(RDMA_CM_EVENT_ESTABLISHED, deadline, reply); !up) return up;
  set_receiver_not_ready_timer(qp_.get());
  return ok();
}

Status VerbsEndpoint::wait_event(rdma_cm_event_type wanted, Deadline deadline, wire::HelloReply* reply) {
  for (;;) {
    if (const int error = wait_for(event_channel_->fd, POLLIN, deadline); error != 0)
      return system_error("wait for RDMA peer", error);
    rdma_cm_event* event = nullptr;
    if (verbs().rdma.get_cm_event(event_channel_.get(), &event) != 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      return system_error("get RDMA connection event");
    }
    const rdma_cm_event_type type = event->event;
    const int status = event->status;
    const bool connecting = type == RDMA_CM_EVENT_ESTABLISHED || type == RDMA_CM_EVENT_REJECTED;
    const rdma_conn_param& parameters = event->param.conn;
    const auto said = connecting
                          ? reply_in(private_data(parameters.private_data, parameters.private_data_len))
                          : std::nullopt;
    (void)verbs().rdma.ack_cm_event(event);
    if (type == RDMA_CM_EVENT_ADDR_CHANGE) continue;
    if (type == wanted && (type != RDMA_CM_EVENT_REJECTED || said)) {
      if (reply != nullptr) *reply = said.value_or(wire::HelloReply{});
      return ok();
    }
    return connect_error(type, status, said ? &*said : nullptr);
  }
}

Result<LocalId> VerbsEndpoint::register_local(const LocalMemory& memory) {
  // Checked as for every provider; after that the device works on the mapping.
  if (auto described = MemoryAccess::describe(memory); !described) return described.error();
  auto registered = domain_->register_memory(memory.base, memory.length_bytes);
  if (!registered) return registered.error();
  locals_.push_back(std::move(registered).value());
  return static_cast<LocalId>(locals_.size() - 1);
}

}  // namespace vmigrate::transport
