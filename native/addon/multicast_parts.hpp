#pragma once

#include <napi.h>

#include "image/fetch.hpp"

namespace vmigrate::addon {

/// What a fetch has received by multicast.
Napi::Object multicast_object(Napi::Env env, const pager::MulticastSnapshot& snapshot);

/// (group, durationMs): resolves when probes have been sent for so long.
Napi::Value send_multicast_probe(const Napi::CallbackInfo& info);
/// (group, timeoutMs): resolves to the size of the largest probe that has come; 0: none.
Napi::Value receive_multicast_probe(const Napi::CallbackInfo& info);

}  // namespace vmigrate::addon
