#include "transport/stream/served_connection.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "base/spin.hpp"
#include "transport/frames.hpp"
#include "transport/hello.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint32_t kSpinCreditMax = 16;
/// Without credit, one wait in this many spins again, to notice that requests come fast again.
constexpr uint32_t kSpinProbeInterval = 16;

int64_t now_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

uint64_t read_cpu_ns(clockid_t clock) {
  timespec time{};
  if (::clock_gettime(clock, &time) != 0) return 0;
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(time.tv_nsec);
}

// A vCPU waits for each demand page. Bulk comes next, ahead of other work, because the guest is degraded
// until bulk is done (two loaded cores, 512 MiB: about 0.9 s instead of 1.2 s with +5). If the kernel refuses
// the higher priority, that only costs latency.
void set_thread_priority(Channel channel) {
  const auto self = static_cast<id_t>(::gettid());
  (void)::setpriority(PRIO_PROCESS, self, channel == Channel::kDemand ? -10 : -5);
}

}  // namespace

std::unique_ptr<ServedConnection> ServedConnection::start(UniqueFd socket, const Admission& admission,
                                                          ServedSession& session, Serve serve) {
  UniqueFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return nullptr;
  std::unique_ptr<ServedConnection> connection(
      new ServedConnection(std::move(socket), std::move(wake), admission));
  try {
    connection->thread_ =
        std::thread([raw = connection.get(), &session, serve] { raw->run(session, serve); });
  } catch (const std::system_error&) {
    return nullptr;
  }
  // The id stays valid until the join. For an exited thread the kernel returns EINVAL.
  if (::pthread_getcpuclockid(connection->thread_.native_handle(), &connection->cpu_clock_) != 0)
    connection->cpu_clock_ = -1;
  return connection;
}

ServedConnection::~ServedConnection() {
  stop();
  if (thread_.joinable()) thread_.join();
}

void ServedConnection::run(ServedSession& session, Serve serve) {
  set_thread_priority(channel_);
  if (begin()) serve(*this, session);
  socket_.reset();
  final_cpu_ns_.store(read_cpu_ns(CLOCK_THREAD_CPUTIME_ID), std::memory_order_relaxed);
  // T1 pairs with T2 in finished(): the last touch of exposed memory and final_cpu_ns_ before the flag.
  finished_.store(true, std::memory_order_release);
}

// Keys of a connection are of no use to anybody once their schedules are made.
bool ServedConnection::begin() {
  auto tags = ConnectionTags::create(admission_.agreed.security, admission_.agreed.source_key,
                                     admission_.agreed.target_key);
  iovec part{&admission_.reply, admission_.reply_bytes};
  const bool is_begun =
      tags.ok() && send(std::span(&part, 1)) &&
      (admission_.agreed.security != Security::kEncrypt || encrypt(admission_.agreed.target_key));
  explicit_bzero(&admission_.agreed, sizeof admission_.agreed);
  if (is_begun) tags_ = std::move(tags).value();
  return is_begun;
}

// Only who has the token gets as far as libssl.
bool ServedConnection::encrypt(const FrameKey& key) {
  auto tls = Tls::create(socket_.get(), End::kSource, key);
  if (!tls) return false;
  for (;;) {
    const int wanted = tls.value()->handshake();
    if (wanted == 0) break;
    if (wanted < 0 || stopping()) return false;
    // A message that is posted meanwhile wakes a wait for POLLIN, which then begins anew.
    if (!wait(static_cast<short>(wanted), wire::kHelloTimeoutMs)) return false;
  }
  socket_.encrypt(std::move(tls).value());
  return true;
}

bool ServedConnection::finished() const {
  return finished_.load(std::memory_order_acquire);  // T2 pairs with T1 in run()
}

void ServedConnection::stop() {
  stop_.store(true, std::memory_order_relaxed);
  // The eventfd orders: a thread that it wakes reads the flag after this write.
  (void)::eventfd_write(wake_.get(), 1);
}

PostStatus ServedConnection::post(std::span<const std::byte> message) {
  if (finished() || stopping()) return PostStatus::kDisconnected;
  {
    const std::lock_guard lock(mail_mutex_);
    if (mail_.full()) return PostStatus::kWouldBlock;
    mail_.push(message);
    mail_waiting_.store(true, std::memory_order_relaxed);
  }
  (void)::eventfd_write(wake_.get(), 1);
  return PostStatus::kPosted;
}

uint64_t ServedConnection::cpu_ns() const {
  if (!finished()) {
    if (const uint64_t now = read_cpu_ns(cpu_clock_)) return now;
  }
  return final_cpu_ns_.load(std::memory_order_relaxed);
}

void ServedConnection::count_read(uint64_t bytes) {
  // Only this thread writes it.
  read_count_.store(read_count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  read_bytes_.store(read_bytes_.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);
}

// Waking a sleeping thread costs more than a page's whole way through the socket, so the demand thread polls
// for the next request for a short while. It does so only if that succeeded lately: each success earns
// credit, and each failure halves the credit.
bool ServedConnection::spin_receive(std::span<std::byte> out, ssize_t* count) {
  if (channel_ != Channel::kDemand || !may_spin()) return false;
  if (spin_credit_ == 0 && ++spin_skipped_ < kSpinProbeInterval) return false;
  spin_skipped_ = 0;
  const int64_t end_ns = now_ns() + kSpinNs;
  do {
    *count = socket_.receive(out);
    if (*count >= 0 || (errno != EAGAIN && errno != EINTR)) {
      spin_credit_ = std::min(spin_credit_ + 1, kSpinCreditMax);
      return true;
    }
    if (stopping() || mail_waiting_.load(std::memory_order_relaxed)) return false;
  } while (now_ns() < end_ns);
  spin_credit_ /= 2;
  return false;
}

size_t ServedConnection::receive(std::span<std::byte> out) {
  while (!stopping()) {
    if (!flush_mail()) return 0;
    ssize_t count = socket_.receive(out);
    if (count < 0 && errno == EAGAIN && !spin_receive(out, &count)) {
      if (!wait(POLLIN, -1)) return 0;
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    return count > 0 ? static_cast<size_t>(count) : 0;
  }
  return 0;
}

// Returns false when the connection is over: it was stopped, or nothing came in time.
bool ServedConnection::wait(short events, int timeout_ms) {
  pollfd entries[] = {{socket_.get(), events, 0}, {wake_.get(), POLLIN, 0}};
  const int64_t end_ns = now_ns() + timeout_ms * 1'000'000LL;
  for (;;) {
    int left_ms = timeout_ms;
    if (timeout_ms >= 0) left_ms = static_cast<int>(std::max<int64_t>(0, (end_ns - now_ns()) / 1'000'000));
    const int count = ::poll(entries, 2, left_ms);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    if (entries[1].revents != 0) {
      eventfd_t ignored = 0;
      (void)::eventfd_read(wake_.get(), &ignored);
      if (stopping()) return false;
      // There is a message to send. A wait for room in the socket continues; receive() sends the message.
      if (events == POLLIN) return true;
    }
    if (entries[0].revents != 0) return true;
  }
}

bool ServedConnection::flush_mail() {
  if (!mail_waiting_.load(std::memory_order_relaxed)) return true;
  std::array<std::byte, wire::kMessageBytesMax> bytes;
  for (;;) {
    size_t length_bytes = 0;
    {
      const std::lock_guard lock(mail_mutex_);
      if (mail_.empty()) {
        mail_waiting_.store(false, std::memory_order_relaxed);
        return true;
      }
      length_bytes = mail_.front().size();
      std::memcpy(bytes.data(), mail_.front().data(), length_bytes);
      mail_.pop();
    }
    wire::FrameHeader header = message_header(length_bytes);
    std::array<std::byte, wire::kFrameTagBytes> tag;
    iovec parts[] = {{&header, sizeof header}, {bytes.data(), length_bytes}, {tag.data(), tags_.tag_bytes()}};
    if (tags_.sent != nullptr) {
      tags_.sent->begin();
      tags_.sent->add(std::as_bytes(std::span(&header, 1)));
      tags_.sent->add({bytes.data(), length_bytes});
      if (!tags_.sent->finish(tag)) return false;
    }
    if (!send(parts)) return false;
  }
}

bool ServedConnection::send(std::span<iovec> parts, bool more, int passed_fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr message{};
  if (passed_fd >= 0) {
    std::memset(control, 0, sizeof control);
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(head), &passed_fd, sizeof passed_fd);
  }
  while (!parts.empty()) {
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    ssize_t count = socket_.send(message, more ? MSG_MORE : 0);
    if (count < 0) {
      if (errno == EINTR) continue;
      // A peer that asks and does not take the answers holds one thread for this long, and no memory.
      if (errno != EAGAIN || !wait(POLLOUT, kReplyTimeoutMs)) return false;
      continue;
    }
    message.msg_control = nullptr;
    message.msg_controllen = 0;
    while (!parts.empty() && static_cast<size_t>(count) >= parts.front().iov_len) {
      count -= static_cast<ssize_t>(parts.front().iov_len);
      parts = parts.subspan(1);
    }
    if (!parts.empty()) {
      parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + count;
      parts.front().iov_len -= static_cast<size_t>(count);
    }
  }
  return true;
}

}  // namespace vmigrate::transport
