// Tests that the decorator which the compliance suite and the pager tests use to inject faults does what it
// is asked for.

#include <algorithm>

#include "tests/transport/compliance.hpp"

namespace vmigrate::transport {
namespace {

class FaultyDecorator : public testing::TestWithParam<const Provider*> {
 protected:
  void SetUp() override {
    if (const std::string missing = missing_for(*GetParam()); !missing.empty()) GTEST_SKIP() << missing;
    listener_ = must_listen(*GetParam());
    session_ = listener_->expose_session(make_credentials(1), nullptr, nullptr).value();
    key_ = session_->expose(remote_.local(), Access::kRead).value();
  }
  void connect_with(const FaultyOptions& options) {
    auto endpoint = connect(*GetParam(), listener_->address(), make_credentials(1));
    ASSERT_TRUE(endpoint.ok());
    endpoint_ = make_faulty(std::move(endpoint).value(), options).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
    for (uint64_t i = 0; i < 16; ++i)
      operations_.push_back(make_operation(i, local_id_, i * 4096, key_, i * 4096, 4096));
  }
  TestMemory remote_{65536}, local_{65536};
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
  std::unique_ptr<Endpoint> endpoint_;
  LocalId local_id_{};
  std::vector<Operation> operations_;
};

TEST_P(FaultyDecorator, FailsTheOperationThatIsAskedFor) {
  FaultyOptions options;
  options.failed_operation = 5;
  options.failed_result = OpResult::kNoSpace;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  ASSERT_EQ(completions.size(), 16u);
  for (const Completion& completion : completions)
    EXPECT_EQ(completion.result, completion.tag == 5 ? OpResult::kNoSpace : OpResult::kOk);
}

TEST_P(FaultyDecorator, DisconnectsAfterTheOperationThatIsAskedFor) {
  FaultyOptions options;
  options.disconnect_after_operations = 7;
  options.completion_delay_polls_max = 3;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  EXPECT_EQ(completions.size(), 7u);
  EXPECT_TRUE(endpoint_->disconnected());
  EXPECT_EQ(endpoint_->read(operations_).status, PostStatus::kDisconnected);
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(FaultyDecorator, ReordersCompletions) {
  FaultyOptions options;
  options.seed = 3;
  options.reorder_completions = true;
  options.completion_delay_polls_max = 8;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  ASSERT_EQ(completions.size(), 16u);
  EXPECT_FALSE(std::is_sorted(completions.begin(), completions.end(),
                              [](const Completion& a, const Completion& b) { return a.tag < b.tag; }));
}

INSTANTIATE_TEST_SUITE_P(Providers, FaultyDecorator, testing::ValuesIn(tested_providers()),
                         [](const auto& test) { return std::string(test.param->name); });

}  // namespace
}  // namespace vmigrate::transport
