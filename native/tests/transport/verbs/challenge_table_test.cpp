#include "transport/verbs/challenge_table.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace vmigrate::transport {
namespace {

using std::chrono::milliseconds;

wire::Hello hello_of(uint8_t seed) {
  wire::Hello hello{};
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kProtocolVersion;
  hello.nonce[0] = seed;
  return hello;
}

class Challenges : public testing::Test {
 protected:
  // Whether a challenge of this hello with this nonce is there; takes it.
  bool take(const wire::Hello& hello, const Nonce& nonce) {
    return table_.take(hello, now_,
                       [&](const Transcript& transcript) { return transcript.source_nonce == nonce; });
  }

  ChallengeTable table_;
  ChallengeTable::Clock::time_point now_ = ChallengeTable::Clock::now();
};

TEST_F(Challenges, EachIsGoodForOneRightAnswer) {
  const Nonce nonce = table_.add(hello_of(1), now_).source_nonce;
  EXPECT_FALSE(take(hello_of(2), nonce)) << "another hello";
  EXPECT_FALSE(take(hello_of(1), Nonce{})) << "a wrong answer";
  wire::Hello second = hello_of(1);
  second.proof[0] = 9;
  EXPECT_TRUE(take(second, nonce)) << "a wrong answer uses none up";
  EXPECT_FALSE(take(second, nonce)) << "the answer again";
}

TEST_F(Challenges, ARepeatedFirstHelloSpoilsNone) {
  const Nonce honest = table_.add(hello_of(1), now_).source_nonce;
  const Nonce strangers = table_.add(hello_of(1), now_).source_nonce;
  EXPECT_NE(honest, strangers);
  EXPECT_TRUE(take(hello_of(1), honest));
}

TEST_F(Challenges, EachEndsInTime) {
  const Nonce nonce = table_.add(hello_of(1), now_).source_nonce;
  now_ += milliseconds(wire::kHelloTimeoutMs);
  EXPECT_FALSE(take(hello_of(1), nonce));
}

TEST_F(Challenges, TheOldestGivesWay) {
  std::vector<Nonce> nonces;
  for (uint32_t i = 0; i <= wire::kHelloPendingMax; ++i)
    nonces.push_back(table_.add(hello_of(1), now_ + milliseconds(i)).source_nonce);
  EXPECT_FALSE(take(hello_of(1), nonces[0]));
  for (uint32_t i = 1; i <= wire::kHelloPendingMax; ++i) EXPECT_TRUE(take(hello_of(1), nonces[i])) << i;
}

}  // namespace
}  // namespace vmigrate::transport
