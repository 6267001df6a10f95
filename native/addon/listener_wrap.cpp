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
  const Napi::Object options = info[0].As<Napi::Object>();
  DataListenerState state;
  if (!is_null(options, "tcp")) {
    const Napi::Object tcp = options.Get("tcp").As<Napi::Object>();
    auto listener = transport::listen_tcp({text(tcp, "address"), static_cast<uint16_t>(number(tcp, "port"))});
    if (!listener) {
      throw_error(env, listener.error());
      return env.Undefined();
    }
    state.tcp = std::move(listener).value();
    state.tcp_address = state.tcp->address();
  }
  if (!is_null(options, "shmPath")) {
    auto listener = transport::listen_shm({text(options, "shmPath"), 0});
    if (!listener) {
      throw_error(env, listener.error());
      return env.Undefined();
    }
    state.shm = std::move(listener).value();
    state.shm_path = state.shm->address().host;
  }
  if (!is_null(options, "rdma")) {
    const Napi::Object rdma = options.Get("rdma").As<Napi::Object>();
    auto listener = transport::listen_verbs(
        {text(rdma, "localAddress"), static_cast<uint16_t>(number(rdma, "port"))}, verbs_options(rdma));
    if (!listener) {
      throw_error(env, listener.error());
      return env.Undefined();
    }
    state.rdma = std::move(listener).value();
    state.rdma_address = state.rdma->address();
  }
  return make(env, env.GetInstanceData<InstanceData>()->data_listener, std::move(state));
}

Napi::Value DataListenerWrap::addresses(const Napi::CallbackInfo& info) {
  Napi::Object object = Napi::Object::New(info.Env());
  if (state_.tcp_address) {
    object.Set("tcpAddress", state_.tcp_address->host);
    object.Set("tcpPort", state_.tcp_address->port);
  }
  if (state_.shm_path) object.Set("shmPath", *state_.shm_path);
  if (state_.rdma_address) {
    object.Set("rdmaAddress", state_.rdma_address->host);
    object.Set("rdmaPort", state_.rdma_address->port);
  }
  return object;
}

Napi::Value DataListenerWrap::is_lost(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), state_.rdma != nullptr && state_.rdma->lost());
}

void DataListenerWrap::close(const Napi::CallbackInfo& info) {
  if (state_.tcp.use_count() > 1 || state_.shm.use_count() > 1 || state_.rdma.use_count() > 1)
    return throw_error(info.Env(),
                       {ErrorCode::kAlreadyExists, 0, "a source session is open on this listener"});
  state_.tcp.reset();
  state_.shm.reset();
  state_.rdma.reset();
}

}  // namespace vmigrate::addon
