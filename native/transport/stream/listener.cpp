#include "transport/stream/listener.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "base/check.hpp"
#include "transport/hello.hpp"
#include "transport/session_lookup.hpp"

namespace vmigrate::transport {

StreamListener::StreamListener(UniqueFd socket, UniqueFd wake, const Address& address,
                               const StreamService& service, std::string unlink_path)
    : address_(address),
      service_(service),
      unlink_path_(std::move(unlink_path)),
      gate_(std::move(socket), std::move(wake), service.tcp, *this) {}

Result<std::unique_ptr<Listener>> StreamListener::start(UniqueFd socket, const Address& address,
                                                        const StreamService& service,
                                                        std::string unlink_path) {
  UniqueFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return system_error("eventfd");
  std::unique_ptr<StreamListener> listener(
      new StreamListener(std::move(socket), std::move(wake), address, service, std::move(unlink_path)));
  if (Status opened = listener->gate_.open(); !opened) return opened.error();
  try {
    listener->thread_ = std::thread([raw = listener.get()] { raw->gate_.run(); });
  } catch (const std::system_error& error) {
    return system_error("start accept thread", error.code().value());
  }
  return std::unique_ptr<Listener>(std::move(listener));
}

StreamListener::~StreamListener() {
  VMG_CHECK(sessions_.empty());
  gate_.stop();
  if (thread_.joinable()) thread_.join();
  if (!unlink_path_.empty()) (void)::unlink(unlink_path_.c_str());
}

Result<std::unique_ptr<ExposedSession>> StreamListener::expose_session(const Credentials& credentials,
                                                                       MessageHandler handler,
                                                                       void* context) {
  const std::lock_guard lock(mutex_);
  if (Status fresh = check_not_exposed(sessions_, credentials); !fresh) return fresh.error();
  auto session = std::make_unique<ServedSession>(*this, service_, credentials, handler, context);
  sessions_.push_back(session.get());
  return std::unique_ptr<ExposedSession>(std::move(session));
}

void StreamListener::forget(ServedSession& session) {
  const std::lock_guard lock(mutex_);
  std::erase(sessions_, &session);
}

wire::HelloStatus StreamListener::admit(const Transcript& transcript, std::span<const uint8_t> proof,
                                        UniqueFd& socket) {
  const std::lock_guard lock(mutex_);
  ServedSession* session = find_admitting(sessions_, transcript, proof);
  if (session == nullptr) return wire::HelloStatus::kRefused;
  const auto asked = static_cast<Security>(transcript.hello.security);
  if (asked > service_.security_max || asked < session->security_min()) return wire::HelloStatus::kRefused;
  Admission admission{.agreed = {}, .reply = {}, .reply_bytes = sizeof(wire::HelloReply)};
  if (!accept_hello(session->credentials().token, transcript, &admission.agreed, &admission.reply))
    return wire::HelloStatus::kBusy;
  return session->adopt(socket, admission);
}

wire::HelloStatus StreamListener::admit_old(const wire::OldHello& hello, UniqueFd& socket) {
  const std::lock_guard lock(mutex_);
  ServedSession* session = find_admitting_old(sessions_, hello);
  // What an older peer understands, and all that one learns here whom nobody expects.
  if (session == nullptr) return wire::HelloStatus::kBadVersion;
  Admission admission{.agreed = {.channel = static_cast<Channel>(hello.channel)},
                      .reply = hello_reply(wire::HelloStatus::kOk),
                      .reply_bytes = wire::kHelloReplyHeadBytes};
  admission.reply.version = wire::kOldHelloVersion;
  return session->adopt(socket, admission);
}

}  // namespace vmigrate::transport
