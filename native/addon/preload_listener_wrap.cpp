#include "addon/handles.hpp"

namespace vmigrate::addon {

namespace {

/// Reads `onEdge` of the options, if there is one. False: an exception is pending.
bool make_edge(const Napi::Object& options, std::shared_ptr<Edge>& edge) {
  const Napi::Value callback = options.Get("onEdge");
  if (!callback.IsFunction()) return true;
  edge = Edge::create(options.Env(), callback.As<Napi::Function>());
  return edge != nullptr;
}

std::function<void()> fire(const std::shared_ptr<Edge>& edge) {
  if (!edge) return {};
  return [edge] { edge->fire(); };
}

Napi::Value wrap(Napi::Env env, Result<std::unique_ptr<pager::PreloadListener>> opened, OwnedEdge edge) {
  if (!opened) {
    throw_error(env, opened.error());
    return env.Undefined();
  }
  PreloadListenerState state;
  state.listener = std::move(opened).value();
  state.edge = std::move(edge);
  return PreloadListenerWrap::make(env, env.GetInstanceData<InstanceData>()->preload_listener,
                                   std::move(state));
}

}  // namespace

Napi::FunctionReference PreloadListenerWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(env, "VmMemory",
                                      {InstanceMethod<&PreloadListenerWrap::snapshot>("snapshot"),
                                       InstanceMethod<&PreloadListenerWrap::hold_trim>("holdTrim"),
                                       InstanceMethod<&PreloadListenerWrap::close>("close")}));
}

Napi::Value PreloadListenerWrap::listen(const Napi::CallbackInfo& info) {
  const Napi::Object options = info[0].As<Napi::Object>();
  std::shared_ptr<Edge> edge;
  if (!make_edge(options, edge)) return info.Env().Undefined();
  OwnedEdge owned(edge);
  pager::PreloadOptions preload{text(options, "socketPath"), region_files(options),
                                flag(options, "isIncoming")};
  if (const Napi::Value uid = options.Get("peerUid"); uid.IsNumber())
    preload.peer_uid = uid.As<Napi::Number>().Uint32Value();
  return wrap(info.Env(), pager::PreloadListener::listen(std::move(preload), fire(edge)), std::move(owned));
}

Napi::Value PreloadListenerWrap::adopt(const Napi::CallbackInfo& info) {
  const Napi::Object options = info[0].As<Napi::Object>();
  std::shared_ptr<Edge> edge;
  if (!make_edge(options, edge)) return info.Env().Undefined();
  OwnedEdge owned(edge);
  return wrap(info.Env(),
              pager::PreloadListener::adopt(vm_snapshot(options.Get("snapshot").As<Napi::Object>()),
                                            region_files(options), fire(edge)),
              std::move(owned));
}

Napi::Value PreloadListenerWrap::snapshot(const Napi::CallbackInfo& info) {
  if (state_.listener) return vm_snapshot_object(info.Env(), state_.listener->snapshot());
  throw_error(info.Env(), kClosedHandle);
  return info.Env().Undefined();
}

void PreloadListenerWrap::hold_trim(const Napi::CallbackInfo& info) {
  if (state_.listener) state_.listener->hold_trim(info[0].As<Napi::Number>().Uint32Value());
}

void PreloadListenerWrap::close(const Napi::CallbackInfo& info) {
  if (state_.listener.use_count() > 1)
    return throw_error(info.Env(),
                       {ErrorCode::kAlreadyExists, 0, "a session or a capture is open on this VM"});
  state_.edge.close();
  state_.listener.reset();
}

}  // namespace vmigrate::addon
