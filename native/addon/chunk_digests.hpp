#pragma once

#include <napi.h>

#include <functional>
#include <vector>

#include "base/result.hpp"
#include "memory/page_tags.hpp"

namespace vmigrate::addon {

/// Runs `digest` off the main thread. The promise resolves to a Buffer.
Napi::Value digest_later(const Napi::CallbackInfo& info, size_t request_argument,
                         std::function<Result<std::vector<std::byte>>(const memory::ChunkRequest&)> digest);

/// Of the memory that has arrived on this host: digestArrived(region, request).
Napi::Value digest_arrived(const Napi::CallbackInfo& info);

}  // namespace vmigrate::addon
