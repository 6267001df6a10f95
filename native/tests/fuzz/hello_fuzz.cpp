// The hello of a stranger to a real listener: a first and a second message of any bytes, of which the input
// may have some put right. Only who has the token is let in.

#include <sys/socket.h>
#include <sys/un.h>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/parked_connection.hpp"
#include "transport/hello.hpp"

namespace vmigrate {
namespace {

using namespace transport;

enum Mode : uint8_t { kSameHello = 1, kRightProof = 2 };
constexpr std::byte kAdmitted{0x5a};

struct Settings {
  uint8_t mode;
  uint8_t split;  ///< where the first hello arrives in two parts
} __attribute__((packed));

/// One session that wants integrity and one for older peers. Whoever is let in gets a byte.
class Host {
 public:
  Host() {
    UniqueFd listening(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const sockaddr any{AF_UNIX, {}};
    VMG_CHECK(::bind(listening.get(), &any, sizeof any.sa_family) == 0 && ::listen(listening.get(), 64) == 0);
    length_ = sizeof address_;
    VMG_CHECK(::getsockname(listening.get(), reinterpret_cast<sockaddr*>(&address_), &length_) == 0);
    listener_ = StreamListener::start(std::move(listening), {}, kService, {}).value();
    for (const bool is_old : {false, true}) {
      Credentials& credentials = is_old ? old : current;
      credentials.session.fill(is_old ? 3 : 1);
      credentials.token.fill(is_old ? 4 : 2);
      credentials.security = is_old ? Security::kNone : Security::kIntegrity;
      credentials.old_hello = is_old;
      sessions_.push_back(listener_->expose_session(credentials, nullptr, nullptr).value());
    }
  }
  UniqueFd connect() const {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    VMG_CHECK(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address_), length_) == 0);
    return fd;
  }

  Credentials current, old;

 private:
  static void serve(ServedConnection& connection, ServedSession&) {
    std::byte admitted = kAdmitted;
    iovec part{&admitted, 1};
    connection.send(std::span(&part, 1));
  }
  static constexpr StreamService kService{.serve = &serve,
                                          .prepare = [](ExposedKey&) { return ok(); },
                                          .tcp = false,
                                          .security_max = Security::kIntegrity};
  sockaddr_un address_{};
  socklen_t length_ = 0;
  std::unique_ptr<Listener> listener_;
  std::vector<std::unique_ptr<ExposedSession>> sessions_;
};

/// False: the connection ended before.
bool receive_whole(int fd, void* out, size_t length_bytes) {
  const std::span bytes(static_cast<std::byte*>(out), length_bytes);
  return fuzz::receive(fd, bytes, MSG_WAITALL) == static_cast<ssize_t>(length_bytes);
}

void send_whole(int fd, const void* from, size_t length_bytes) {
  (void)::send(fd, from, length_bytes, MSG_NOSIGNAL);
}

/// Whether the peer is let in, and with what reply, if it has got one.
struct Outcome {
  bool is_admitted = false;
  bool has_reply = false;
  wire::HelloReply reply{};
};

Outcome rest_of(int fd, size_t reply_bytes) {
  Outcome outcome;
  ::shutdown(fd, SHUT_WR);
  outcome.has_reply = receive_whole(fd, &outcome.reply, reply_bytes);
  std::byte last{};
  outcome.is_admitted = outcome.has_reply && receive_whole(fd, &last, 1) && last == kAdmitted;
  return outcome;
}

/// In one message, as older peers do.
void say_old(const Host& host, int fd, const wire::Hello& first) {
  wire::OldHello hello;
  std::memcpy(&hello, &first, sizeof hello);
  const bool is_channel = hello.channel == 1 || hello.channel == 2;
  const bool is_right = hello.magic == wire::kHelloMagic && is_channel &&
                        std::memcmp(hello.session, host.old.session.data(), sizeof hello.session) == 0 &&
                        std::memcmp(hello.token, host.old.token.data(), sizeof hello.token) == 0;
  const Outcome outcome = rest_of(fd, is_right ? wire::kHelloReplyHeadBytes : sizeof(wire::HelloReply));
  VMG_CHECK(outcome.is_admitted == is_right && outcome.has_reply);
  if (is_right) VMG_CHECK(outcome.reply.version == wire::kOldHelloVersion && outcome.reply.status == 1);
}

void say(const Host& host, int fd, fuzz::Input& input, const wire::Hello& first, uint8_t mode) {
  wire::HelloReply challenge{};
  if (check_hello(first) != wire::HelloStatus::kOk) {
    const Outcome outcome = rest_of(fd, sizeof(wire::HelloReply));
    VMG_CHECK(outcome.has_reply && !outcome.is_admitted);
    VMG_CHECK(outcome.reply.status == static_cast<uint16_t>(check_hello(first)));
    return;
  }
  VMG_CHECK(receive_whole(fd, &challenge, sizeof challenge));
  VMG_CHECK(challenge.status == static_cast<uint16_t>(wire::HelloStatus::kChallenge));
  Transcript transcript{first, {}};
  std::copy(std::begin(challenge.value), std::end(challenge.value), transcript.source_nonce.begin());
  const bool is_old = std::memcmp(first.session, host.old.session.data(), sizeof first.session) == 0;
  const Credentials& credentials = is_old ? host.old : host.current;
  auto second = input.take<wire::Hello>();
  Proof proof;
  VMG_CHECK(make_proof(credentials.token, End::kTarget, transcript, &proof));
  if ((mode & kSameHello) != 0) std::memcpy(&second, &first, offsetof(wire::Hello, proof));
  if ((mode & kRightProof) != 0) std::copy(proof.begin(), proof.end(), second.proof);
  send_whole(fd, &second, sizeof second);

  const bool is_session =
      is_old || std::memcmp(first.session, host.current.session.data(), sizeof first.session) == 0;
  const bool is_secure = first.security == static_cast<uint8_t>(Security::kIntegrity) ||
                         (is_old && first.security == static_cast<uint8_t>(Security::kNone));
  const bool is_right = is_session && is_secure && is_same_hello(first, second) &&
                        std::memcmp(second.proof, proof.data(), proof.size()) == 0;
  const Outcome outcome = rest_of(fd, sizeof(wire::HelloReply));
  VMG_CHECK(outcome.has_reply && outcome.is_admitted == is_right);
  VMG_CHECK(outcome.reply.status ==
            static_cast<uint16_t>(is_right ? wire::HelloStatus::kOk : wire::HelloStatus::kRefused));
  if (!is_right) return;
  Agreed agreed;
  wire::HelloReply expected;
  VMG_CHECK(accept_hello(credentials.token, transcript, &agreed, &expected));
  VMG_CHECK(std::memcmp(&outcome.reply, &expected, sizeof expected) == 0);
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  Credentials credentials;
  for (const auto security : {Security::kNone, Security::kIntegrity, Security::kEncrypt}) {
    for (const uint8_t session : {1, 3, 9}) {
      credentials.session.fill(session);
      const wire::Hello hello = Greeting(credentials, Channel::kDemand, security).hello();
      for (uint8_t mode = 0; mode < 4; ++mode)
        all.push_back(Seed().add(Settings{mode, 20}).add(hello).add(hello));
    }
  }
  for (const uint8_t token : {4, 5}) {
    credentials.session.fill(3);
    credentials.token.fill(token);
    all.push_back(Seed().add(Settings{0, 0}).add(make_old_hello(credentials, Channel::kBulk)));
  }
  wire::Hello wrong{};
  all.push_back(Seed().add(Settings{0, 0}).add(wrong));
  wrong.magic = wire::kHelloMagic;
  all.push_back(Seed().add(Settings{0, 55}).add(wrong));
  all.push_back(Seed().add(Settings{0, 0}).fill(30, 1));
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto* const host = new Host;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const UniqueFd fd = host->connect();
  const auto part = input.bytes(sizeof(wire::Hello));
  if (part.size() < sizeof(wire::Hello)) {
    send_whole(fd.get(), part.data(), part.size());
    VMG_CHECK(!rest_of(fd.get(), 1).has_reply);
    return 0;
  }
  wire::Hello first;
  std::memcpy(&first, part.data(), sizeof first);
  const size_t split = settings.split % sizeof first;
  send_whole(fd.get(), &first, split);
  send_whole(fd.get(), reinterpret_cast<const std::byte*>(&first) + split, sizeof first - split);
  if (first.version == wire::kOldHelloVersion)
    say_old(*host, fd.get(), first);
  else
    say(*host, fd.get(), input, first, settings.mode);
  return 0;
}
