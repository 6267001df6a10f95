#include "multicast/datagram/auth.hpp"

#include <openssl/crypto.h>

#include <cstring>

#include "base/check.hpp"
#include "multicast/datagram/header.hpp"

namespace vmigrate::multicast {

Result<std::unique_ptr<DatagramAuth>> DatagramAuth::create(const Key& key) {
  auto gmac = Gmac::create(std::span<const uint8_t, 32>(key));
  if (!gmac) return gmac.error();
  return std::unique_ptr<DatagramAuth>(new DatagramAuth(std::move(gmac).value()));
}

/// Everything but the tag itself is authenticated, and nothing is encrypted.
bool DatagramAuth::tag_of(std::span<const std::byte> datagram, uint8_t (&tag)[wire::kDatagramTagBytes]) {
  VMG_CHECK(datagram.size() >= sizeof(DatagramHeader));
  DatagramHeader header;
  std::memcpy(&header, datagram.data(), sizeof(header));
  const uint32_t member = header.member;
  const uint64_t sequence = header.sequence;
  uint8_t nonce[Gmac::kNonceBytes];
  std::memcpy(nonce, &member, sizeof(member));
  std::memcpy(nonce + sizeof(member), &sequence, sizeof(sequence));
  gmac_->begin(nonce);
  gmac_->add(datagram.first(offsetof(DatagramHeader, tag)));
  gmac_->add(datagram.subspan(sizeof(header)));
  return gmac_->finish(tag);
}

bool DatagramAuth::sign(std::span<std::byte> datagram) {
  uint8_t tag[wire::kDatagramTagBytes];
  if (!tag_of(datagram, tag)) return false;
  std::memcpy(datagram.data() + offsetof(DatagramHeader, tag), tag, sizeof(tag));
  return true;
}

bool DatagramAuth::verify(std::span<const std::byte> datagram) {
  uint8_t tag[wire::kDatagramTagBytes];
  return tag_of(datagram, tag) &&
         ::CRYPTO_memcmp(tag, datagram.data() + offsetof(DatagramHeader, tag), sizeof(tag)) == 0;
}

}  // namespace vmigrate::multicast
