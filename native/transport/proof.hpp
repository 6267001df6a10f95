#pragma once

#include <array>
#include <cstdint>

#include "base/result.hpp"
#include "transport/transport.hpp"

namespace vmigrate::transport {

using Nonce = std::array<uint8_t, wire::kHelloNonceBytes>;
using Proof = std::array<uint8_t, wire::kHelloProofBytes>;
using FrameKey = std::array<uint8_t, 32>;

/// All that was said before the proofs: the first HELLO, whose proof is zero, and the source's nonce. Proofs
/// cover it, so neither the channel nor the security can be changed on the way, and a recorded proof fits no
/// other connection.
struct Transcript {
  wire::Hello hello{};
  Nonce source_nonce{};
};

enum class End : uint8_t { kTarget = 1, kSource };

/// HMAC-SHA256 of the end's name and the transcript, by the token. False: libcrypto failed.
bool make_proof(const SessionToken& token, End end, const Transcript& transcript, Proof* proof);

/// The key of what `sender` sends: HKDF-SHA256 of the token, with both nonces as salt, so that no two
/// connections have one key. `purpose` is a constant of the caller. False: libcrypto failed.
bool derive_key(const SessionToken& token, End sender, const char* purpose, const Transcript& transcript,
                FrameKey* key);

/// From the kernel's generator.
Nonce random_nonce();

}  // namespace vmigrate::transport
