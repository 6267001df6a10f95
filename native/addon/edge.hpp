#pragma once

#include <napi.h>

#include <memory>
#include <mutex>

namespace vmigrate::addon {

/// Reports "something changed" to JavaScript. Native threads fire, and one call of the callback follows for
/// any number of them. An edge never blocks a native thread on JavaScript and never keeps the process alive.
///
/// Native threads may hold an Edge longer than the environment lives. When the environment ends, the edge is
/// closed before the thread-safe function is freed, because clean-up hooks run in reverse order and ours was
/// added later.
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
  /// nullptr once closed. mutex_ guards it and is_pending_, which is true while a call is queued and has not
  /// run yet.
  napi_threadsafe_function function_ = nullptr;
  bool is_pending_ = false;
};

/// Closes its edge when it is destroyed; a member of a wrapper.
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
