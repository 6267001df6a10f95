#pragma once

#include <algorithm>
#include <vector>

#include "transport/credentials.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The session that a hello names, if its token is right and its channel exists; nullptr otherwise. Every
/// session is compared, so that the time shows neither which ids exist nor how much of a token was right.
template <typename Session>
Session* find_admitting(const std::vector<Session*>& sessions, const wire::Hello& hello) {
  Session* admitting = nullptr;
  for (Session* session : sessions) {
    const bool same_session = equal_constant_time(session->credentials().session, hello.session);
    const bool same_token = equal_constant_time(session->credentials().token, hello.token);
    if (same_session & same_token) admitting = session;
  }
  const auto channel = static_cast<Channel>(hello.channel);
  return channel == Channel::kDemand || channel == Channel::kBulk ? admitting : nullptr;
}

/// For the owner of the sessions, whose lookup no peer can time.
template <typename Session>
Status check_not_exposed(const std::vector<Session*>& sessions, const Credentials& credentials) {
  const bool is_exposed = std::any_of(sessions.begin(), sessions.end(), [&](const Session* session) {
    return session->credentials().session == credentials.session;
  });
  if (is_exposed) return Error{ErrorCode::kAlreadyExists, 0, "session is exposed already"};
  return ok();
}

}  // namespace vmigrate::transport
