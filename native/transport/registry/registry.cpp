#include "transport/registry/registry.hpp"

#include <algorithm>
#include <array>

#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"
#include "transport/verbs/provider.hpp"

namespace vmigrate::transport {
namespace {

constexpr std::array kProviders = {&kTcpProvider, &kShmProvider, &kVerbsProvider};

}  // namespace

std::span<const Provider* const> providers() {
  return kProviders;
}

const Provider* find_provider(std::string_view name, std::span<const Provider* const> table) {
  const auto found = std::find_if(table.begin(), table.end(),
                                  [name](const Provider* provider) { return provider->name == name; });
  return found == table.end() ? nullptr : *found;
}

}  // namespace vmigrate::transport
