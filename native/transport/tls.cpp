#include "transport/tls.hpp"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

namespace vmigrate::transport {
namespace {

constexpr const char* kCipher = "TLS_AES_256_GCM_SHA384";
constexpr unsigned char kCipherId[] = {0x13, 0x02};
constexpr const char* kKeyName = "vmigrate";
/// AES-GCM is good for 2^24.5 full records of one key (RFC 8446, 5.5). libssl does not count them. Where it
/// cannot renew the key (kTLS), the connection ends, and the target comes back with another.
constexpr uint64_t kRecordsOfOneKeyMax = 1 << 23;

constexpr Error kNoTls{ErrorCode::kUnsupported, 0, "libssl has no TLS 1.3 with pre-shared keys"};

struct FreeContext {
  void operator()(SSL_CTX* context) const { ::SSL_CTX_free(context); }
};
struct FreeSession {
  void operator()(SSL_SESSION* session) const { ::SSL_SESSION_free(session); }
};
using Session = std::unique_ptr<SSL_SESSION, FreeSession>;

// Where the key is until the handshake is done: the session, which the SSL owns by this index.
int key_index() {
  static const int index = ::SSL_get_ex_new_index(
      0, nullptr, nullptr, nullptr, [](void*, void* session, CRYPTO_EX_DATA*, int, long, void*) {
        ::SSL_SESSION_free(static_cast<SSL_SESSION*>(session));
      });
  return index;
}

Session key_of(SSL* ssl) {
  auto* session = static_cast<SSL_SESSION*>(::SSL_get_ex_data(ssl, key_index()));
  if (session == nullptr || ::SSL_SESSION_up_ref(session) != 1) return nullptr;
  return Session(session);
}

// libssl takes over the reference that these two return.
int offer_key(SSL* ssl, const EVP_MD* hash, const unsigned char** name, size_t* name_bytes,
              SSL_SESSION** session) {
  *session = nullptr;
  // After a HelloRetryRequest only a key of the chosen cipher's hash may be offered.
  if (hash != nullptr && ::EVP_MD_get_size(hash) != ::EVP_MD_get_size(::EVP_sha384())) return 1;
  *name = reinterpret_cast<const unsigned char*>(kKeyName);
  *name_bytes = std::strlen(kKeyName);
  *session = key_of(ssl).release();
  return *session != nullptr;
}

int find_key(SSL* ssl, const unsigned char* name, size_t name_bytes, SSL_SESSION** session) {
  const bool is_ours = name_bytes == std::strlen(kKeyName) && std::memcmp(name, kKeyName, name_bytes) == 0;
  *session = is_ours ? key_of(ssl).release() : nullptr;
  return 1;
}

std::unique_ptr<SSL_CTX, FreeContext> make_context() {
  std::unique_ptr<SSL_CTX, FreeContext> context(::SSL_CTX_new(::TLS_method()));
  if (context == nullptr) return nullptr;
  SSL_CTX* raw = context.get();
  // The kernel takes over the encryption if it can (kTLS). An end without a word is an end: frames have
  // lengths.
  ::SSL_CTX_set_options(raw, SSL_OP_ENABLE_KTLS | SSL_OP_NO_TICKET | SSL_OP_IGNORE_UNEXPECTED_EOF);
  ::SSL_CTX_set_mode(raw, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  ::SSL_CTX_set_read_ahead(raw, 1);
  ::SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  // Without the key the peer would have to show a certificate, and we know nobody who signs one.
  ::SSL_CTX_set_verify(raw, SSL_VERIFY_PEER, nullptr);
  ::SSL_CTX_set_psk_use_session_callback(raw, &offer_key);
  ::SSL_CTX_set_psk_find_session_callback(raw, &find_key);
  const bool is_set =
      ::SSL_CTX_set_min_proto_version(raw, TLS1_3_VERSION) == 1 &&
      ::SSL_CTX_set_max_proto_version(raw, TLS1_3_VERSION) == 1 &&
      ::SSL_CTX_set_ciphersuites(raw, kCipher) == 1 && ::SSL_CTX_set_num_tickets(raw, 0) == 1 &&
      // Without one, libssl refuses keys that come before where it would ask for certificates.
      ::SSL_CTX_set_session_id_context(raw, reinterpret_cast<const unsigned char*>(kKeyName),
                                       static_cast<unsigned>(std::strlen(kKeyName))) == 1;
  return is_set ? std::move(context) : nullptr;
}

bool keep_key(SSL* ssl, const FrameKey& key) {
  Session session(::SSL_SESSION_new());
  const SSL_CIPHER* cipher = ::SSL_CIPHER_find(ssl, kCipherId);
  if (session == nullptr || cipher == nullptr ||
      ::SSL_SESSION_set1_master_key(session.get(), key.data(), key.size()) != 1 ||
      ::SSL_SESSION_set_cipher(session.get(), cipher) != 1 ||
      ::SSL_SESSION_set_protocol_version(session.get(), TLS1_3_VERSION) != 1 ||
      ::SSL_SESSION_set1_id_context(session.get(), reinterpret_cast<const unsigned char*>(kKeyName),
                                    static_cast<unsigned>(std::strlen(kKeyName))) != 1 ||
      ::SSL_set_ex_data(ssl, key_index(), session.get()) != 1)
    return false;
  (void)session.release();
  return true;
}

bool would_die_of_sigpipe() {
  struct sigaction action {};
  return ::sigaction(SIGPIPE, nullptr, &action) != 0 || action.sa_handler == SIG_DFL;
}

}  // namespace

Result<std::unique_ptr<Tls>> Tls::create(int fd, End end, const FrameKey& key) {
  if (would_die_of_sigpipe())
    return Error{ErrorCode::kUnsupported, 0, "TLS needs a process that ignores SIGPIPE"};
  const auto context = make_context();
  if (context == nullptr) return kNoTls;
  SSL* ssl = ::SSL_new(context.get());
  if (ssl == nullptr) return Error{ErrorCode::kOutOfMemory, 0, "TLS"};
  std::unique_ptr<Tls> tls(new Tls(ssl));
  if (!keep_key(ssl, key) || ::SSL_set_fd(ssl, fd) != 1) return kNoTls;
  if (end == End::kTarget)
    ::SSL_set_connect_state(ssl);
  else
    ::SSL_set_accept_state(ssl);
  return tls;
}

Tls::~Tls() {
  ::SSL_free(ssl_);
}

int Tls::handshake() {
  ::ERR_clear_error();
  const int result = ::SSL_do_handshake(ssl_);
  // "Reused" is what libssl calls a handshake by a key that was there before.
  if (result == 1) {
    is_drained_ = ::SSL_has_pending(ssl_) == 0;
    return ::SSL_session_reused(ssl_) == 1 ? 0 : -1;
  }
  switch (::SSL_get_error(ssl_, result)) {
    case SSL_ERROR_WANT_READ:
      return POLLIN;
    case SSL_ERROR_WANT_WRITE:
      return POLLOUT;
    default:
      return -1;
  }
}

ssize_t Tls::receive(std::span<std::byte> out) {
  ::ERR_clear_error();
  size_t count = 0;
  const int result = ::SSL_read_ex(ssl_, out.data(), out.size(), &count);
  is_drained_ = result != 1;
  return result == 1 ? static_cast<ssize_t>(count) : failed(result);
}

ssize_t Tls::send(std::span<const std::byte> bytes) {
  ::ERR_clear_error();
  // Before a write, never after one: libssl sends the message first with whatever comes next, and a read that
  // had to send it would wait for room while its caller waits for bytes.
  if (record_count_ >= kRecordsOfOneKeyMax) {
    record_count_ = 0;
    if (::SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED) != 1) {
      errno = EPROTO;
      return -1;
    }
  }
  size_t count = 0;
  const int result = ::SSL_write_ex(ssl_, bytes.data(), bytes.size(), &count);
  if (result != 1) return failed(result);
  record_count_ += count / SSL3_RT_MAX_PLAIN_LENGTH + 1;
  return static_cast<ssize_t>(count);
}

ssize_t Tls::failed(int result) {
  const int system_errno = errno;
  switch (::SSL_get_error(ssl_, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
      errno = EAGAIN;
      return -1;
    case SSL_ERROR_ZERO_RETURN:
      return 0;
    case SSL_ERROR_SYSCALL:
      errno =
          system_errno != 0 && system_errno != EAGAIN && system_errno != EINTR ? system_errno : ECONNRESET;
      return -1;
    default:
      errno = EPROTO;
      return -1;
  }
}

Status shake_hands(Tls& tls, int fd, Deadline deadline) {
  for (;;) {
    const int wanted = tls.handshake();
    if (wanted == 0) return ok();
    if (wanted < 0) return Error{ErrorCode::kDisconnected, 0, "the TLS handshake with the peer has failed"};
    const int failure = wait_for(fd, static_cast<short>(wanted), deadline);
    if (failure == ETIMEDOUT) return Error{ErrorCode::kTimeout, failure, "TLS handshake"};
    if (failure != 0) return system_error("TLS handshake", failure);
  }
}

}  // namespace vmigrate::transport
