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
  Security security = Security::kNone;
};
void PrintTo(const ComplianceCase& tested, std::ostream* out);

inline constexpr uint64_t kRegionBytes = 8 << 20;

class TransportCompliance : public testing::TestWithParam<ComplianceCase> {
 protected:
  TransportCompliance();
  ~TransportCompliance() override;
  void SetUp() override;
  const Provider& provider() const { return *GetParam().provider; }

  void listen();
  std::unique_ptr<ExposedSession> must_expose(const Credentials& credentials,
                                              MessageHandler handler = nullptr, void* context = nullptr);
  std::unique_ptr<Endpoint> must_connect(Channel channel = Channel::kDemand);
  std::unique_ptr<Endpoint> must_connect(const Address& address, const Credentials& credentials,
                                         Channel channel = Channel::kDemand);
  std::unique_ptr<Endpoint> decorate(std::unique_ptr<Endpoint> endpoint);
  RemoteKey must_expose_memory(const TestMemory& memory, Access access = Access::kRead);

  const Credentials credentials_ = make_credentials(1, GetParam().security);
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
};

inline Operation make_operation(uint64_t tag, LocalId local, uint64_t local_offset, const RemoteKey& key,
                                uint64_t remote_offset, uint64_t length_bytes) {
  return Operation{tag, local, local_offset, key, remote_offset, static_cast<uint32_t>(length_bytes)};
}

}  // namespace vmigrate::transport
