#pragma once

#include <algorithm>
#include <vector>

#include "transport/credentials.hpp"
#include "transport/hello.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

/// The session whose id this is, or nullptr. Every session is compared, so that the time does not show which
/// ids exist.
template <typename Session>
Session* find_session(const std::vector<Session*>& sessions, std::span<const uint8_t> id) {
  Session* found = nullptr;
  for (Session* session : sessions) {
    if (equal_constant_time(session->credentials().session, id)) found = session;
  }
  return found;
}

/// The session that a proof opens, or nullptr. The proof for an unknown session is computed too, with a token
/// that nobody has, so that the time is the same.
template <typename Session>
Session* find_admitting(const std::vector<Session*>& sessions, const Transcript& transcript,
                        std::span<const uint8_t> proof) {
  Session* session = find_session(sessions, transcript.hello.session);
  const SessionToken nobodys{};
  const SessionToken& token = session != nullptr ? session->credentials().token : nobodys;
  Proof expected;
  if (!make_proof(token, End::kTarget, transcript, &expected)) return nullptr;
  return equal_constant_time(expected, proof) ? session : nullptr;
}

/// The same for a hello of OLD_HELLO_VERSION, which opens only sessions that say so.
template <typename Session>
Session* find_admitting_old(const std::vector<Session*>& sessions, const wire::OldHello& hello) {
  Session* session = find_session(sessions, hello.session);
  if (session == nullptr || !session->credentials().old_hello) return nullptr;
  const auto channel = static_cast<Channel>(hello.channel);
  const bool is_right = equal_constant_time(session->credentials().token, hello.token);
  return is_right && (channel == Channel::kDemand || channel == Channel::kBulk) ? session : nullptr;
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
