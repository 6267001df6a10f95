#include "addon/handles.hpp"

namespace vmigrate::addon {

Napi::FunctionReference DataListenerWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(env, "DataListener",
                                      {InstanceMethod<&DataListenerWrap::addresses>("addresses"),
                                       InstanceMethod<&DataListenerWrap::is_lost>("isLost"),
                                       InstanceMethod<&DataListenerWrap::close>("close")}));
}

Napi::Value DataListenerWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  DataListenerState state;
  const Napi::Array places = info[0].As<Napi::Object>().Get("listen").As<Napi::Array>();
  for (uint32_t i = 0; i < places.Length(); i++) {
    const Napi::Object place = places.Get(i).As<Napi::Object>();
    const auto found = provider(place);
    auto listener = found ? found.value()->listen(address(place), provider_options(place))
                          : Result<std::unique_ptr<transport::Listener>>(found.error());
    if (!listener) {
      throw_error(env, listener.error());
      return env.Undefined();
    }
    const transport::Address at = listener.value()->address();
    state.served.push_back({found.value(), std::move(listener).value(), at});
  }
  return make(env, env.GetInstanceData<InstanceData>()->data_listener, std::move(state));
}

std::shared_ptr<transport::Listener> DataListenerWrap::listener(const std::string& provider) const {
  for (const DataListenerState::Served& served : state_.served)
    if (served.provider->name == provider) return served.listener;
  return nullptr;
}

Napi::Value DataListenerWrap::addresses(const Napi::CallbackInfo& info) {
  Napi::Object object = Napi::Object::New(info.Env());
  for (const DataListenerState::Served& served : state_.served) {
    Napi::Object place = Napi::Object::New(info.Env());
    place.Set("host", served.address.host);
    place.Set("port", served.address.port);
    object.Set(served.provider->name, place);
  }
  return object;
}

Napi::Value DataListenerWrap::is_lost(const Napi::CallbackInfo& info) {
  bool is_lost = false;
  for (const DataListenerState::Served& served : state_.served)
    is_lost |= served.listener != nullptr && served.listener->lost();
  return Napi::Boolean::New(info.Env(), is_lost);
}

void DataListenerWrap::close(const Napi::CallbackInfo& info) {
  for (const DataListenerState::Served& served : state_.served)
    if (served.listener.use_count() > 1)
      return throw_error(info.Env(),
                         {ErrorCode::kAlreadyExists, 0, "a source session is open on this listener"});
  for (DataListenerState::Served& served : state_.served) served.listener.reset();
}

}  // namespace vmigrate::addon
