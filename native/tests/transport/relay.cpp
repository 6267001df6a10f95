#include "tests/transport/relay.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "base/check.hpp"
#include "tests/transport/hostile_fixture.hpp"
#include "transport/frames.hpp"

namespace vmigrate::transport {
namespace {

constexpr int kPollMs = 20;
/// Of TLS: type, version, and the length in the last two bytes.
constexpr size_t kRecordHeaderBytes = 5;

size_t number_of(Way way) {
  return static_cast<size_t>(way);
}

}  // namespace

Relay::Relay(const Address& source, Options options)
    : source_(source), options_(std::move(options)), random_(options_.seed) {
  listening_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof here;
  auto* address = reinterpret_cast<sockaddr*>(&here);
  VMG_CHECK(::bind(listening_.get(), address, length) == 0 && ::listen(listening_.get(), 1) == 0);
  VMG_CHECK(::getsockname(listening_.get(), address, &length) == 0);
  address_ = {"127.0.0.1", ntohs(here.sin_port)};
  streams_[number_of(Way::kToSource)].hello_bytes_left = 2 * sizeof(wire::Hello);
  streams_[number_of(Way::kToTarget)].hello_bytes_left = 2 * sizeof(wire::HelloReply);
  thread_ = std::thread([this] { run(); });
}

Relay::~Relay() {
  stop_.store(true, std::memory_order_relaxed);
  thread_.join();
}

std::vector<Bytes> Relay::recorded(Way way) const {
  const std::lock_guard lock(mutex_);
  return streams_[number_of(way)].frames;
}

void Relay::run() {
  pollfd accepting{listening_.get(), POLLIN, 0};
  while (::poll(&accepting, 1, kPollMs) <= 0) {
    if (stop_.load(std::memory_order_relaxed)) return;
  }
  to_[number_of(Way::kToTarget)].reset(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  to_[number_of(Way::kToSource)] = raw_connect(kTcpProvider, source_);
  const int on = 1;
  for (const UniqueFd& fd : to_) (void)::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  bool is_open = true;
  while (is_open && !stop_.load(std::memory_order_relaxed)) {
    // What goes to the source comes from the target, and the other way round.
    pollfd entries[] = {{to_[1].get(), POLLIN, 0}, {to_[0].get(), POLLIN, 0}};
    if (::poll(entries, 2, kPollMs) < 0) continue;
    for (size_t i = 0; i < 2; ++i)
      if (entries[i].revents != 0) is_open = is_open && pass(static_cast<Way>(i));
  }
  for (UniqueFd& fd : to_) fd.reset();
}

// The length of the first whole frame, its tag included; 0: it has not come yet.
size_t Relay::frame_bytes(Way way, const Bytes& waiting) const {
  if (options_.is_encrypted) {
    if (waiting.size() < kRecordHeaderBytes) return 0;
    const auto length = std::to_integer<size_t>(waiting[3]) << 8 | std::to_integer<size_t>(waiting[4]);
    return waiting.size() >= kRecordHeaderBytes + length ? kRecordHeaderBytes + length : 0;
  }
  if (waiting.size() < sizeof(wire::FrameHeader)) return 0;
  const wire::FrameHeader header = decode_header(waiting.data());
  const auto op = static_cast<wire::FrameOp>(header.op);
  const bool has_body = op == wire::FrameOp::kMessage ||
                        op == (way == Way::kToSource ? wire::FrameOp::kWrite : wire::FrameOp::kReadReply);
  const size_t bytes = sizeof header + (has_body ? header.length : 0) + wire::kFrameTagBytes;
  return waiting.size() >= bytes ? bytes : 0;
}

// False: an end has closed.
bool Relay::pass(Way way) {
  Stream& stream = streams_[number_of(way)];
  Bytes come(1 << 16);
  const ssize_t count = ::recv(to_[1 - number_of(way)].get(), come.data(), come.size(), MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (count <= 0) return false;
  stream.waiting.insert(stream.waiting.end(), come.begin(), come.begin() + count);
  if (const size_t hello = std::min(stream.hello_bytes_left, stream.waiting.size()); hello > 0) {
    const auto end = stream.waiting.begin() + static_cast<ptrdiff_t>(hello);
    Bytes bytes(stream.waiting.begin(), end);
    stream.waiting.erase(stream.waiting.begin(), end);
    stream.hello_bytes_left -= hello;
    if (options_.alter_hello) options_.alter_hello(way, bytes);
    if (!send_pieces(way, bytes)) return false;
  }
  while (const size_t bytes = frame_bytes(way, stream.waiting)) {
    const auto end = stream.waiting.begin() + static_cast<ptrdiff_t>(bytes);
    const Bytes frame(stream.waiting.begin(), end);
    stream.waiting.erase(stream.waiting.begin(), end);
    const size_t index = stream.frames.size();
    {
      const std::lock_guard lock(mutex_);
      stream.frames.push_back(frame);
    }
    const auto sent = options_.alter ? options_.alter(way, index, frame) : std::vector<Bytes>{frame};
    for (const Bytes& one : sent)
      if (!send_pieces(way, one)) return false;
  }
  return true;
}

bool Relay::send_pieces(Way way, const Bytes& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    // Short pieces cut headers and tags, long ones keep the test short.
    const size_t max = random_() % 4 == 0 ? 64 : 20'000;
    const size_t piece =
        options_.cuts ? std::min<size_t>(1 + random_() % max, bytes.size() - done) : bytes.size() - done;
    if (!send_exactly(to_[number_of(way)].get(), std::span(bytes).subspan(done, piece), soon()).ok())
      return false;
    done += piece;
    if (options_.cuts && random_() % 8 == 0) std::this_thread::yield();
  }
  return true;
}

}  // namespace vmigrate::transport
