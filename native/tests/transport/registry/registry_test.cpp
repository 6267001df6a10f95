#include "transport/registry/registry.hpp"

#include <gtest/gtest.h>

#include <array>
#include <set>
#include <string>

#include "tests/transport/unix_provider.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"
#include "transport/verbs/provider.hpp"

namespace vmigrate::transport {
namespace {

TEST(Registry, FindsEachProviderByItsName) {
  EXPECT_EQ(find_provider("tcp"), &kTcpProvider);
  EXPECT_EQ(find_provider("shm"), &kShmProvider);
  EXPECT_EQ(find_provider("verbs"), &kVerbsProvider);
}

TEST(Registry, KnowsNoOther) {
  for (const char* name : {"", "rdma", "TCP", "tcp ", "unix"})
    EXPECT_EQ(find_provider(name), nullptr) << name;
}

TEST(Registry, ProvidersHaveNamesOfTheirOwnAndCanConnectAndListen) {
  std::set<std::string> names;
  for (const Provider* provider : providers()) {
    EXPECT_TRUE(names.insert(provider->name).second) << provider->name;
    EXPECT_NE(provider->connect, nullptr) << provider->name;
    EXPECT_NE(provider->listen, nullptr) << provider->name;
  }
}

TEST(Registry, LooksIntoTheTableItIsGiven) {
  const std::array table = {&kTcpProvider, &kUnixProvider};
  EXPECT_EQ(find_provider("unix", table), &kUnixProvider);
  EXPECT_EQ(find_provider("shm", table), nullptr);
}

TEST(Registry, AnOptionThatAProviderDoesNotKnowIsRefused) {
  for (const Provider* provider : providers()) {
    const Options unknown = {{"colour", uint64_t{1}}};
    const auto listener = provider->listen({}, unknown);
    const auto endpoint = provider->connect({}, {}, Channel::kDemand, std::chrono::milliseconds(1), unknown);
    ASSERT_FALSE(listener.ok());
    ASSERT_FALSE(endpoint.ok());
    if (provider->devices != nullptr && listener.error().code == ErrorCode::kUnsupported)
      continue;  // left out
    EXPECT_EQ(listener.error().code, ErrorCode::kInvalidArgument) << provider->name;
    EXPECT_EQ(endpoint.error().code, ErrorCode::kInvalidArgument) << provider->name;
  }
}

}  // namespace
}  // namespace vmigrate::transport
