#pragma once

#include <span>
#include <string_view>

#include "transport/transport.hpp"

namespace vmigrate::transport {

/// Every provider that is built in. May be called before main().
std::span<const Provider* const> providers();

/// nullptr: there is none of that name. `table`: where to look; a test may have providers of its own.
const Provider* find_provider(std::string_view name, std::span<const Provider* const> table = providers());

}  // namespace vmigrate::transport
