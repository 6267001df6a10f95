// Tests headers and tags of datagrams, against bytes that another implementation has made.

#include "multicast/datagram/auth.hpp"

#include <gtest/gtest.h>

#include <numeric>

#include "multicast/datagram/header.hpp"
#include "multicast/datagram/writer.hpp"

namespace vmigrate::multicast {
namespace {

Key counting_key() {
  Key key;
  std::iota(key.begin(), key.end(), uint8_t{0});
  return key;
}

std::vector<std::byte> counting_datagram(size_t payload_bytes) {
  std::vector<std::byte> datagram(sizeof(DatagramHeader) + payload_bytes);
  for (size_t i = 0; i < payload_bytes; ++i) datagram[sizeof(DatagramHeader) + i] = static_cast<std::byte>(i);
  return datagram;
}

std::unique_ptr<DatagramAuth> auth_of(const Key& key) {
  auto auth = DatagramAuth::create(key);
  EXPECT_TRUE(auth.ok());
  return std::move(auth).value();
}

// Made by Node's crypto: createCipheriv('aes-256-gcm', key, nonce) with header and payload as additional
// data.
TEST(DatagramAuth, MakesTheTagThatOthersMake) {
  const auto auth = auth_of(counting_key());
  DatagramWriter writer(*auth, 0x1122334455667788, kSenderMember, 7);
  auto datagram = counting_datagram(64);
  ASSERT_TRUE(writer.finish(datagram, DatagramKind::kData, 2, 0x3040));
  constexpr uint8_t kHeader[] = {0xd1, 1, 2, 0, 64, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
                                 7,    0, 0, 0, 0,  0, 0, 0, 0x40, 0x30, 0,    0,    0,    0,    0,    0};
  EXPECT_EQ(std::memcmp(datagram.data(), kHeader, sizeof(kHeader)), 0);
  constexpr uint8_t kTag[] = {0xaf, 0xff, 0x6f, 0xa1, 0xdd, 0x37, 0xc4, 0x6d,
                              0x39, 0xce, 0x40, 0x95, 0x95, 0x0b, 0xf4, 0x7b};
  EXPECT_EQ(std::memcmp(datagram.data() + sizeof(kHeader), kTag, sizeof(kTag)), 0);
  EXPECT_TRUE(auth->verify(datagram));
}

TEST(DatagramAuth, EveryBitCounts) {
  const auto auth = auth_of(counting_key());
  DatagramWriter writer(*auth, 1, 3, 1);
  auto datagram = counting_datagram(40);
  ASSERT_TRUE(writer.finish(datagram, DatagramKind::kReport));
  for (size_t bit = 0; bit < datagram.size() * 8; ++bit) {
    datagram[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(auth->verify(datagram)) << bit;
    datagram[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  EXPECT_TRUE(auth->verify(datagram));
  datagram.pop_back();
  EXPECT_FALSE(auth->verify(datagram));
}

TEST(DatagramAuth, AnotherKeyMakesAnotherTag) {
  const auto auth = auth_of(counting_key());
  Key other = counting_key();
  other[31] ^= 1;
  auto datagram = counting_datagram(64);
  const auto other_auth = auth_of(other);
  DatagramWriter forger(*other_auth, 1, kSenderMember, 1);
  ASSERT_TRUE(forger.finish(datagram, DatagramKind::kData));
  EXPECT_TRUE(other_auth->verify(datagram));
  EXPECT_FALSE(auth->verify(datagram));
}

TEST(DatagramAuth, UsesNoNonceTwice) {
  const auto auth = auth_of(counting_key());
  DatagramWriter writer(*auth, 1, 5, 9);
  auto first = counting_datagram(0), second = counting_datagram(0);
  ASSERT_TRUE(writer.finish(first, DatagramKind::kReport) && writer.finish(second, DatagramKind::kReport));
  EXPECT_EQ(parse_header(first)->sequence, 9u);
  EXPECT_EQ(parse_header(second)->sequence, 10u);
  EXPECT_EQ(writer.next_sequence(), 11u);
}

TEST(DatagramHeader, MustBeOursAndOfThisLength) {
  const auto auth = auth_of(counting_key());
  DatagramWriter writer(*auth, 1, kSenderMember, 1);
  auto datagram = counting_datagram(128);
  ASSERT_TRUE(writer.finish(datagram, DatagramKind::kData));
  EXPECT_TRUE(parse_header(datagram).has_value());
  EXPECT_EQ(payload_of(datagram).size(), 128u);
  for (size_t length = 0; length < datagram.size(); ++length)
    EXPECT_FALSE(parse_header(std::span(datagram).first(length)).has_value()) << length;
  auto longer = datagram;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(parse_header(longer).has_value());
  datagram[0] = std::byte{0xd2};
  EXPECT_FALSE(parse_header(datagram).has_value());
}

}  // namespace
}  // namespace vmigrate::multicast
