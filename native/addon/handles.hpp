#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "addon/edge.hpp"
#include "addon/wrap.hpp"
#include "pager/preload_listener.hpp"
#include "pager/source.hpp"
#include "pager/target.hpp"
#include "transport/transport.hpp"

namespace vmigrate::addon {

// The four handle classes. Owners hold what they depend on by shared_ptr, so that environments may end, and
// the collector may run, in any order; a handle that others still depend on refuses an explicit close. State
// is touched on the JS thread alone; Tasks hold references of their own.

struct VmMemoryState {
  std::shared_ptr<pager::PreloadListener> listener;  ///< nullptr once closed
  OwnedEdge edge;
};

class VmMemoryWrap final : public Wrap<VmMemoryWrap, VmMemoryState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value listen(const Napi::CallbackInfo& info);
  static Napi::Value adopt(const Napi::CallbackInfo& info);
  const std::shared_ptr<pager::PreloadListener>& listener() const { return state_.listener; }

 private:
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
};

struct DataListenerState {
  std::shared_ptr<transport::Listener> tcp, shm, rdma;  ///< nullptr if not asked for, or closed
  std::optional<transport::Address> tcp_address, rdma_address;
  std::optional<std::string> shm_path;
};

class DataListenerWrap final : public Wrap<DataListenerWrap, DataListenerState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);
  std::shared_ptr<transport::Listener> listener(const std::string& transport) const {
    if (transport == "rdma") return state_.rdma;
    return transport == "tcp" ? state_.tcp : state_.shm;
  }

 private:
  Napi::Value addresses(const Napi::CallbackInfo& info);
  Napi::Value is_lost(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
};

struct SourceSessionState {
  std::shared_ptr<transport::Listener> listener;  ///< outlives `session`: declared first
  std::unique_ptr<pager::SourceSession> session;  ///< nullptr once closed
  std::vector<uint64_t> final_counters;
  std::optional<Error> final_failure;
};

class SourceSessionWrap final : public Wrap<SourceSessionWrap, SourceSessionState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  Napi::Value keys(const Napi::CallbackInfo& info);
  void freeze(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
};

/// A session and the VM it fills, in the order in which they must be destroyed (last member first).
struct TargetCoreHolder {
  std::shared_ptr<pager::PreloadListener> vm;
  std::unique_ptr<pager::TargetSession> session;
  size_t region_count = 0;
};

struct TargetSessionState {
  std::shared_ptr<TargetCoreHolder> core;  ///< nullptr once closed
  OwnedEdge edge;
  std::vector<uint64_t> final_counters;
  std::optional<Error> final_failure;
};

class TargetSessionWrap final : public Wrap<TargetSessionWrap, TargetSessionState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  Napi::Value connect(const Napi::CallbackInfo& info);
  void start(const Napi::CallbackInfo& info);
  void serve_demand(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  bool is_connecting_ = false;
};

}  // namespace vmigrate::addon
