#include "addon/edge.hpp"

#include "base/check.hpp"

namespace vmigrate::addon {

std::shared_ptr<Edge> Edge::create(Napi::Env env, Napi::Function callback) {
  std::shared_ptr<Edge> edge(new Edge(env));
  // The queued call refers to the edge through the function's context, which lives as long as the function.
  auto* context = new std::shared_ptr<Edge>(edge);
  const auto free_context = [](napi_env, void* data, void*) {
    delete static_cast<std::shared_ptr<Edge>*>(data);
  };
  const napi_status status = napi_create_threadsafe_function(
      env, callback, nullptr, Napi::String::New(env, "vmigrate edge"), /*max_queue_size=*/1,
      /*initial_thread_count=*/1, context, free_context, context, &Edge::call_js, &edge->function_);
  if (status != napi_ok) {
    delete context;
    Napi::Error::New(env).ThrowAsJavaScriptException();
    return nullptr;
  }
  napi_unref_threadsafe_function(env, edge->function_);
  VMG_CHECK(napi_add_env_cleanup_hook(env, &Edge::on_environment_end, edge.get()) == napi_ok);
  return edge;
}

Edge::~Edge() {
  // Called by the wrapper that owns the edge, or when the environment ends.
  VMG_CHECK(function_ == nullptr);
}

void Edge::fire() {
  std::lock_guard lock(mutex_);
  if (function_ == nullptr || is_pending_) return;
  // The queue has room for the one call that can be pending. The only other possible status is that it is
  // closing.
  is_pending_ = napi_call_threadsafe_function(function_, nullptr, napi_tsfn_nonblocking) == napi_ok;
}

void Edge::close() {
  napi_threadsafe_function function;
  {
    std::lock_guard lock(mutex_);
    function = std::exchange(function_, nullptr);
  }
  if (function == nullptr) return;
  napi_remove_env_cleanup_hook(env_, &Edge::on_environment_end, this);
  napi_release_threadsafe_function(function, napi_tsfn_release);
}

void Edge::on_environment_end(void* self) {
  Edge& edge = *static_cast<Edge*>(self);
  std::lock_guard lock(edge.mutex_);
  edge.function_ = nullptr;
}

bool Edge::take_pending() {
  std::lock_guard lock(mutex_);
  return std::exchange(is_pending_, false) && function_ != nullptr;
}

void Edge::call_js(napi_env env, napi_value callback, void* context, void*) {
  // Without an environment the context is already freed, and the queue is only being emptied.
  if (env == nullptr || callback == nullptr) return;
  // Holds a reference of our own, because the callback may close the handle that owns the edge.
  const std::shared_ptr<Edge> edge = *static_cast<std::shared_ptr<Edge>*>(context);
  // Cleared before the call, so that a change during the call is reported again.
  if (!edge->take_pending()) return;
  napi_value receiver, result;
  if (napi_get_undefined(env, &receiver) == napi_ok)
    napi_call_function(env, receiver, callback, 0, nullptr, &result);
}

}  // namespace vmigrate::addon
