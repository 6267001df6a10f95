#include "tests/fuzz/parked_connection.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "base/check.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace vmigrate::fuzz {
namespace {

using namespace transport;

/// More than the answers to any input.
constexpr int kSendBufferBytes = 32 << 20;

std::atomic<ServedConnection*> parked{nullptr};

void park(ServedConnection& connection, ServedSession& /*session*/) {
  parked.store(&connection);
  for (;;) ::pause();
}

struct SocketPair {
  SocketPair() {
    int ends[2];
    VMG_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    own.reset(ends[0]);
    peer.reset(ends[1]);
  }
  UniqueFd own, peer;
};

}  // namespace

ParkedConnection::ParkedConnection(Status (*prepare)(ExposedKey& key), MessageHandler handler, void* context)
    : service_{.serve = &park, .prepare = prepare, .tcp = false} {
  UniqueFd listening(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // An address that the kernel chooses; nobody connects.
  const sockaddr address{AF_UNIX, {}};
  VMG_CHECK(::bind(listening.get(), &address, sizeof address.sa_family) == 0);
  VMG_CHECK(::listen(listening.get(), 1) == 0);
  listener_ = StreamListener::start(std::move(listening), {}, service_, {}).value();
  exposed_ = listener_->expose_session({}, handler, context).value();
  session_ = static_cast<ServedSession*>(exposed_.get());
  SocketPair sockets;
  socket_number_ = sockets.own.get();
  const Admission admission{.agreed = {.channel = Channel::kBulk}, .reply = {}, .reply_bytes = 0};
  VMG_CHECK(session_->adopt(sockets.own, admission) == wire::HelloStatus::kOk);
  while ((connection_ = parked.load()) == nullptr) std::this_thread::yield();
}

Replies ParkedConnection::serve(std::span<const std::byte> stream, std::span<const size_t> splits,
                                ServedConnection::Serve serve) {
  const SocketPair sockets;
  // Forced: the limit of the system is less than the answers to some inputs.
  VMG_CHECK(::setsockopt(sockets.own.get(), SOL_SOCKET, SO_SNDBUFFORCE, &kSendBufferBytes,
                         sizeof kSendBufferBytes) == 0);
  send_in_parts(sockets.peer.get(), stream, splits);
  ::shutdown(sockets.peer.get(), SHUT_WR);
  VMG_CHECK(::dup3(sockets.own.get(), socket_number_, O_CLOEXEC) == socket_number_);
  serve(*connection_, *session_);

  Replies replies;
  static std::array<std::byte, 64 << 10> part;
  for (;;) {
    iovec body{part.data(), part.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &body;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t count = ::recvmsg(sockets.peer.get(), &message, MSG_DONTWAIT);
    if (count <= 0) return replies;
    replies.bytes.insert(replies.bytes.end(), part.begin(), part.begin() + count);
    if (const cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(head), sizeof fd);
      ::close(fd);
      ++replies.descriptor_count;
    }
  }
}

/// The kernel joins no bytes across a descriptor that travels with them.
void send_in_parts(int socket, std::span<const std::byte> stream, std::span<const size_t> splits) {
  size_t sent_bytes = 0;
  const auto send_to = [&](size_t end, bool with_descriptor) {
    const auto part = stream.subspan(sent_bytes, end - sent_bytes);
    if (part.empty()) return;
    const size_t descriptor_count = with_descriptor ? 1 : 0;
    VMG_CHECK(send_with(socket, part, {&socket, descriptor_count}) == static_cast<ssize_t>(part.size()));
    sent_bytes = end;
  };
  for (const size_t split : splits) send_to(std::min(split, stream.size()), true);
  send_to(stream.size(), false);
}

}  // namespace vmigrate::fuzz
