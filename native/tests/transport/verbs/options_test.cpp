#if __has_include(<infiniband/verbs.h>) && __has_include(<rdma/rdma_cma.h>)

#include "transport/verbs/options.hpp"

#include <gtest/gtest.h>

namespace vmigrate::transport {
namespace {

TEST(VerbsOptions, AreTakenByName) {
  const auto none = verbs_options({});
  ASSERT_TRUE(none.ok());
  EXPECT_EQ(none.value().local_host, "");
  EXPECT_EQ(none.value().ack_timeout_exponent, 18);
  EXPECT_EQ(none.value().retry_count, 7);
  const auto all = verbs_options({{"localAddress", std::string("10.0.0.2")},
                                  {"ackTimeoutExponent", uint64_t{14}},
                                  {"retryCount", uint64_t{0}}});
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all.value().local_host, "10.0.0.2");
  EXPECT_EQ(all.value().ack_timeout_exponent, 14);
  EXPECT_EQ(all.value().retry_count, 0);
}

TEST(VerbsOptions, OutOfRangeOfTheWrongKindOrUnknownAreRefused) {
  const Options wrong[] = {
      {{"ackTimeoutExponent", uint64_t{0}}},      {{"ackTimeoutExponent", uint64_t{32}}},
      {{"ackTimeoutExponent", std::string("8")}}, {{"retryCount", uint64_t{8}}},
      {{"retryCount", std::string("1")}},         {{"localAddress", uint64_t{1}}},
      {{"rnrRetryCount", uint64_t{1}}},           {{"", uint64_t{1}}},
  };
  for (const Options& options : wrong) {
    const auto parsed = verbs_options(options);
    ASSERT_FALSE(parsed.ok()) << options.begin()->first;
    EXPECT_EQ(parsed.error().code, ErrorCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace vmigrate::transport

#endif
