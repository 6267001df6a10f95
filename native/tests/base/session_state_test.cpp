#include "base/session_state.hpp"

#include <gtest/gtest.h>

namespace vmigrate {
namespace {

enum class Step { kFirst, kSecond, kFailed };

TEST(SessionState, ChangesOnlyFromTheStatesNamed) {
  SessionState<Step> state{Step::kFirst};
  EXPECT_FALSE(state.advance({Step::kSecond, Step::kFailed}, Step::kFirst));
  int runs = 0;
  EXPECT_FALSE(state.advance({Step::kSecond}, Step::kFailed, [&] { ++runs; }));
  EXPECT_EQ(runs, 0);
  EXPECT_TRUE(state.advance({Step::kFirst}, Step::kSecond, [&] {
    ++runs;
    EXPECT_EQ(state.get(), Step::kFirst) << "nobody sees the new state yet";
  }));
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(state.get(), Step::kSecond);
}

TEST(SessionState, KeepsTheFirstError) {
  SessionState<Step> state{Step::kFirst};
  EXPECT_FALSE(state.failure());
  EXPECT_TRUE(state.fail({Step::kFirst, Step::kSecond}, Step::kFailed, {ErrorCode::kNoSpace, 28, "one"}));
  EXPECT_FALSE(state.fail({Step::kFirst, Step::kSecond}, Step::kFailed, {ErrorCode::kClosed, 0, "two"}));
  EXPECT_EQ(state.failure()->code, ErrorCode::kNoSpace);
}

}  // namespace
}  // namespace vmigrate
