#pragma once

#include <span>
#include <string_view>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Every provider that is built in. May be called before main().
std::span<const Provider* const> providers();

/// nullptr: no provider has that name. `table`: the providers to search; a test may pass its own.
const Provider* find_provider(std::string_view name, std::span<const Provider* const> table = providers());

}  // namespace vmigrate::transport
