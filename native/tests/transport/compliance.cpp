#include "tests/transport/compliance.hpp"

namespace vmigrate::transport {

void PrintTo(const ComplianceCase& tested, std::ostream* out) {
  *out << tested.provider->name << (tested.faulty ? ", faulty" : "")
       << (tested.security == Security::kNone        ? ""
           : tested.security == Security::kIntegrity ? ", integrity"
                                                     : ", encrypt");
}

TransportCompliance::TransportCompliance() = default;
TransportCompliance::~TransportCompliance() = default;

void TransportCompliance::SetUp() {
  if (const std::string missing = missing_for(provider()); !missing.empty()) GTEST_SKIP() << missing;
}

void TransportCompliance::listen() {
  listener_ = must_listen(provider());
  session_ = must_expose(credentials_);
}
std::unique_ptr<ExposedSession> TransportCompliance::must_expose(const Credentials& credentials,
                                                                 MessageHandler handler, void* context) {
  auto session = listener_->expose_session(credentials, handler, context);
  EXPECT_TRUE(session.ok());
  return std::move(session).value();
}
std::unique_ptr<Endpoint> TransportCompliance::must_connect(Channel channel) {
  return must_connect(listener_->address(), credentials_, channel);
}
std::unique_ptr<Endpoint> TransportCompliance::must_connect(const Address& address,
                                                            const Credentials& credentials, Channel channel) {
  auto endpoint = connect(provider(), address, credentials, channel);
  EXPECT_TRUE(endpoint.ok()) << endpoint.error().what << " errno " << endpoint.error().system_errno;
  return decorate(std::move(endpoint).value());
}
std::unique_ptr<Endpoint> TransportCompliance::decorate(std::unique_ptr<Endpoint> endpoint) {
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
RemoteKey TransportCompliance::must_expose_memory(const TestMemory& memory, Access access) {
  auto key = session_->expose(memory.local(), access);
  EXPECT_TRUE(key.ok());
  return key.value();
}

}  // namespace vmigrate::transport
