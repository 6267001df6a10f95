#include "transport/stream/hello_gate.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "transport/hello.hpp"
#include "transport/socket.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kListeningEvent = UINT64_MAX;
constexpr uint64_t kWakeEvent = UINT64_MAX - 1;
constexpr std::chrono::milliseconds kAcceptPause{100};

Status watch(int epoll, int fd, uint64_t data) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = data;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) return system_error("epoll_ctl accept");
  return ok();
}

}  // namespace

HelloGate::HelloGate(UniqueFd listening, UniqueFd wake, bool tcp, Owner& owner)
    : listening_(std::move(listening)), wake_(std::move(wake)), tcp_(tcp), owner_(owner) {}

Status HelloGate::open() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return system_error("epoll_create");
  if (Status watched = watch(epoll_.get(), wake_.get(), kWakeEvent); !watched) return watched;
  return watch(epoll_.get(), listening_.get(), kListeningEvent);
}

void HelloGate::stop() {
  stop_.store(true, std::memory_order_relaxed);
  (void)::eventfd_write(wake_.get(), 1);
}

void HelloGate::run() {
  std::array<epoll_event, 32> events;
  while (!stop_.load(std::memory_order_relaxed)) {
    const int count =
        ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), wait_ms(Clock::now()));
    for (int i = 0; i < count; ++i) {
      const uint64_t data = events[static_cast<size_t>(i)].data.u64;
      if (data == kWakeEvent) continue;
      if (data == kListeningEvent) {
        accept_all();
        continue;
      }
      Pending& pending = pending_[data & 0xffff];
      if (pending.fd.valid() && pending.generation == data >> 32) receive(pending);
    }
    expire(Clock::now());
  }
  for (Pending& pending : pending_) pending.fd.reset();
}

int HelloGate::wait_ms(Clock::time_point now) const {
  Clock::time_point next = accepting_ ? Clock::time_point::max() : accept_again_;
  for (const Pending& pending : pending_) {
    if (pending.fd.valid()) next = std::min(next, pending.deadline);
  }
  if (next == Clock::time_point::max()) return -1;
  if (next <= now) return 0;
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(next - now).count());
}

void HelloGate::accept_all() {
  // Accepts a bounded number, so that connections that already wait get their turn under a flood.
  for (int accepted = 0; accepted < 32; ++accepted) {
    UniqueFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd.valid()) {
      if (errno == EAGAIN) return;
      // We are out of descriptors or memory: the connection stays queued and the socket readable, so a plain
      // retry would burn a core. All other errors concern one connection that is already gone.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) return pause_accepting();
      continue;
    }
    if (tcp_ && !set_tcp_options(fd.get())) continue;

    auto slot = slot_for_another();
    if (slot->fd.valid()) reject(*slot);
    slot->fd = std::move(fd);
    ++slot->generation;
    slot->received_bytes = 0;
    slot->is_challenged = false;
    slot->deadline = Clock::now() + std::chrono::milliseconds(wire::kHelloTimeoutMs);
    const auto index = static_cast<uint64_t>(slot - pending_.begin());
    if (!watch(epoll_.get(), slot->fd.get(), uint64_t{slot->generation} << 32 | index)) reject(*slot);
  }
}

// A free slot, else the oldest of those that have sent a hello or of those that have not, whichever hold more
// than half of the table: a flood of one kind cannot push out the other.
HelloGate::Pending* HelloGate::slot_for_another() {
  const auto challenged_count = std::count_if(pending_.begin(), pending_.end(), [](const Pending& pending) {
    return pending.fd.valid() && pending.is_challenged;
  });
  const bool gives_challenged = static_cast<size_t>(challenged_count) > pending_.size() / 2;
  return std::min_element(pending_.begin(), pending_.end(), [&](const Pending& a, const Pending& b) {
    if (a.fd.valid() != b.fd.valid()) return !a.fd.valid();
    if (a.is_challenged != b.is_challenged) return a.is_challenged == gives_challenged;
    return a.deadline < b.deadline;
  });
}

void HelloGate::pause_accepting() {
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, listening_.get(), nullptr);
  accepting_ = false;
  accept_again_ = Clock::now() + kAcceptPause;
}

void HelloGate::receive(Pending& pending) {
  while (pending.fd.valid() && receive_hello(pending)) {
    pending.received_bytes = 0;
    if (pending.is_challenged || pending.hello.version == wire::kOldHelloVersion)
      hand_over(pending);
    else
      answer_first(pending);
  }
}

// False: the rest has not come yet, or the peer has gone.
bool HelloGate::receive_hello(Pending& pending) {
  while (pending.received_bytes < sizeof pending.hello) {
    auto* bytes = reinterpret_cast<std::byte*>(&pending.hello);
    const ssize_t count = ::recv(pending.fd.get(), bytes + pending.received_bytes,
                                 sizeof pending.hello - pending.received_bytes, MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return false;
    if (count <= 0) {
      reject(pending);
      return false;
    }
    pending.received_bytes += static_cast<uint32_t>(count);
  }
  return true;
}

// No session is looked up for it, so the answer says nothing of them.
void HelloGate::answer_first(Pending& pending) {
  const wire::HelloStatus status = check_hello(pending.hello);
  if (status != wire::HelloStatus::kOk) return refuse(pending, status);
  pending.transcript = {pending.hello, random_nonce()};
  pending.is_challenged = true;
  const wire::HelloReply reply = challenge(pending.transcript.source_nonce);
  // So few bytes always fit into a fresh socket.
  if (::send(pending.fd.get(), &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof reply)
    reject(pending);
}

void HelloGate::hand_over(Pending& pending) {
  // The serving thread owns the socket from here on; a stale event of ours must not touch it.
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, pending.fd.get(), nullptr);
  wire::HelloStatus status = wire::HelloStatus::kRefused;
  if (pending.is_challenged) {
    if (is_same_hello(pending.transcript.hello, pending.hello))
      status = owner_.admit(pending.transcript, pending.hello.proof, pending.fd);
  } else if (pending.hello.magic != wire::kHelloMagic) {
    status = wire::HelloStatus::kBadMagic;
  } else {
    wire::OldHello old;
    std::memcpy(&old, &pending.hello, sizeof old);
    status = owner_.admit_old(old, pending.fd);
    explicit_bzero(&old, sizeof old);
  }
  explicit_bzero(&pending.hello, sizeof pending.hello);
  if (status != wire::HelloStatus::kOk) return refuse(pending, status);
  pending.fd.reset();
}

void HelloGate::refuse(Pending& pending, wire::HelloStatus status) {
  if (pending.fd.valid()) {
    const wire::HelloReply reply = hello_reply(status);
    // It does not matter if the peer is gone.
    (void)::send(pending.fd.get(), &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  reject(pending);
}

void HelloGate::reject(Pending& pending) {
  pending.fd.reset();
  rejected_hellos_.fetch_add(1, std::memory_order_relaxed);
}

void HelloGate::expire(Clock::time_point now) {
  for (Pending& pending : pending_) {
    if (pending.fd.valid() && pending.deadline <= now) reject(pending);
  }
  if (!accepting_ && accept_again_ <= now) {
    accepting_ = true;
    if (!watch(epoll_.get(), listening_.get(), kListeningEvent)) pause_accepting();
  }
}

}  // namespace vmigrate::transport
