#pragma once

// Shared by all files of the transport compliance suite. The suite is the transport contract in executable
// form: each provider must pass it bare and under the faulty decorator. Its instances are named in
// memory_test.cpp; a further file needs no more than TEST_P(TransportCompliance, ...).

#include <memory>
#include <string>
#include <utility>

#include "tests/transport/fixture.hpp"

namespace vmigrate::transport {

struct ComplianceCase {
  const Provider* provider;
  bool faulty;
};
inline void PrintTo(const ComplianceCase& tested, std::ostream* out) {
  *out << tested.provider->name << (tested.faulty ? ", faulty" : "");
}

inline constexpr uint64_t kRegionBytes = 8 << 20;

class TransportCompliance : public testing::TestWithParam<ComplianceCase> {
 protected:
  void SetUp() override {
    if (const std::string missing = missing_for(provider()); !missing.empty()) GTEST_SKIP() << missing;
  }
  const Provider& provider() const { return *GetParam().provider; }

  void listen() {
    listener_ = must_listen(provider());
    session_ = must_expose(credentials_);
  }
  std::unique_ptr<ExposedSession> must_expose(const Credentials& credentials,
                                              MessageHandler handler = nullptr, void* context = nullptr) {
    auto session = listener_->expose_session(credentials, handler, context);
    EXPECT_TRUE(session.ok());
    return std::move(session).value();
  }
  std::unique_ptr<Endpoint> must_connect(Channel channel = Channel::kDemand) {
    return must_connect(listener_->address(), credentials_, channel);
  }
  std::unique_ptr<Endpoint> must_connect(const Address& address, const Credentials& credentials,
                                         Channel channel = Channel::kDemand) {
    auto endpoint = connect(provider(), address, credentials, channel);
    EXPECT_TRUE(endpoint.ok()) << endpoint.error().what << " errno " << endpoint.error().system_errno;
    return decorate(std::move(endpoint).value());
  }
  std::unique_ptr<Endpoint> decorate(std::unique_ptr<Endpoint> endpoint) {
    if (!GetParam().faulty) return endpoint;
    FaultyOptions options;
    options.seed = 7;
    options.completion_delay_polls_max = 4;
    options.reorder_completions = true;
    options.would_block_permille = 200;
    options.short_batches = true;
    auto faulty = make_faulty(std::move(endpoint), options);
    EXPECT_TRUE(faulty.ok());
    return std::move(faulty).value();
  }
  RemoteKey must_expose_memory(const TestMemory& memory, Access access = Access::kRead) {
    auto key = session_->expose(memory.local(), access);
    EXPECT_TRUE(key.ok());
    return key.value();
  }

  const Credentials credentials_ = make_credentials(1);
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
};

inline Operation make_operation(uint64_t tag, LocalId local, uint64_t local_offset, const RemoteKey& key,
                                uint64_t remote_offset, uint64_t length_bytes) {
  return Operation{tag, local, local_offset, key, remote_offset, static_cast<uint32_t>(length_bytes)};
}

}  // namespace vmigrate::transport
