#pragma once

#include <napi.h>

#include <utility>

#include "addon/convert.hpp"

namespace vmigrate::addon {

/// One set of classes per environment: the main thread and each worker have their own set.
struct InstanceData {
  Napi::FunctionReference preload_listener, data_listener, source_session, target_session, image_capture,
      image_fetch, image_digests, multicast_sender, pacer;
};

/// Base of the handle classes. `State` is the data that a handle owns. The function that opened the handle
/// passes it to the constructor, which JavaScript cannot usefully call by itself.
template <typename Self, typename State>
class Wrap : public Napi::ObjectWrap<Self> {
 public:
  explicit Wrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Self>(info) {
    if (info.Length() == 1 && info[0].IsExternal())
      state_ = std::move(*info[0].As<Napi::External<State>>().Data());
    else
      throw_error(info.Env(), {ErrorCode::kInvalidArgument, 0, "handles are made by the open calls"});
  }

  static Napi::Value make(Napi::Env env, const Napi::FunctionReference& constructor, State state) {
    return constructor.New({Napi::External<State>::New(env, &state)});
  }

 protected:
  State state_;
};

inline const Error kClosedHandle{ErrorCode::kClosed, 0, "the handle is closed"};

}  // namespace vmigrate::addon
