#pragma once

#include <napi.h>

#include <memory>
#include <mutex>

namespace vmigrate::addon {

/// Tells JavaScript "something changed": native threads fire, one call of the callback follows for any number
/// of them. Never blocks a native thread on JavaScript, never keeps the process alive.
///
/// Native threads may hold an Edge longer than the environment lives: at its end the edge is closed before
/// the thread-safe function is freed, because clean-up hooks run in reverse order and ours was added later.
class Edge {
 public:
  /// JS thread. nullptr with a pending exception on failure.
  static std::shared_ptr<Edge> create(Napi::Env env, Napi::Function callback);
  ~Edge();
  Edge(const Edge&) = delete;
  Edge& operator=(const Edge&) = delete;

  /// Any thread.
  void fire();
  /// JS thread; idempotent. The callback is not called again.
  void close();

 private:
  explicit Edge(napi_env env) : env_(env) {}
  static void call_js(napi_env env, napi_value callback, void* context, void* data);
  static void on_environment_end(void* self);
  bool take_pending();

  napi_env env_;
  std::mutex mutex_;
  /// nullptr once closed. Guarded by mutex_, as is_pending_: a call is queued and has not run yet.
  napi_threadsafe_function function_ = nullptr;
  bool is_pending_ = false;
};

/// An edge whose owner closes it: member of a wrapper, destroyed with it.
class OwnedEdge {
 public:
  OwnedEdge() = default;
  explicit OwnedEdge(std::shared_ptr<Edge> edge) : edge_(std::move(edge)) {}
  OwnedEdge(OwnedEdge&&) = default;
  OwnedEdge& operator=(OwnedEdge&&) = default;
  ~OwnedEdge() { close(); }
  void close() {
    if (edge_) edge_->close();
    edge_.reset();
  }

 private:
  std::shared_ptr<Edge> edge_;
};

}  // namespace vmigrate::addon
