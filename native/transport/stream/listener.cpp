#include "transport/stream/listener.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "base/check.hpp"
#include "transport/credentials.hpp"
#include "transport/hello.hpp"

namespace vmigrate::transport {

StreamListener::StreamListener(UniqueFd socket, UniqueFd wake, const Address& address,
                               const StreamProvider& provider, std::string unlink_path)
    : address_(address),
      provider_(provider),
      unlink_path_(std::move(unlink_path)),
      gate_(std::move(socket), std::move(wake), provider.tcp, &StreamListener::admit_hello, this) {}

Result<std::unique_ptr<Listener>> StreamListener::start(UniqueFd socket, const Address& address,
                                                        const StreamProvider& provider,
                                                        std::string unlink_path) {
  UniqueFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return system_error("eventfd");
  std::unique_ptr<StreamListener> listener(
      new StreamListener(std::move(socket), std::move(wake), address, provider, std::move(unlink_path)));
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
  for (const ServedSession* session : sessions_) {
    if (session->credentials().session == credentials.session)
      return Error{ErrorCode::kAlreadyExists, 0, "session is exposed already"};
  }
  auto session = std::make_unique<ServedSession>(*this, provider_, credentials, handler, context);
  sessions_.push_back(session.get());
  return std::unique_ptr<ExposedSession>(std::move(session));
}

void StreamListener::forget(ServedSession& session) {
  const std::lock_guard lock(mutex_);
  std::erase(sessions_, &session);
}

wire::HelloStatus StreamListener::admit(const wire::Hello& hello, UniqueFd& socket) {
  const std::lock_guard lock(mutex_);
  ServedSession* admitted = nullptr;
  // Every session is looked at, so that the time tells neither which ids exist nor how much was right.
  for (ServedSession* session : sessions_) {
    const bool same_session = equal_constant_time(session->credentials().session, hello.session);
    const bool same_token = equal_constant_time(session->credentials().token, hello.token);
    if (same_session & same_token) admitted = session;
  }
  const auto channel = static_cast<Channel>(hello.channel);
  if (admitted == nullptr || (channel != Channel::kDemand && channel != Channel::kBulk))
    return wire::HelloStatus::kRefused;
  return admitted->adopt(socket, channel);
}

}  // namespace vmigrate::transport
