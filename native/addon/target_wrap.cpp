#include "addon/connect.hpp"
#include "addon/handles.hpp"
#include "addon/task.hpp"

namespace vmigrate::addon {

namespace {

std::vector<uint64_t> counters_of(const pager::TargetSession& session) {
  std::vector<uint64_t> counters(wire::kTargetCounterCount);
  session.counters(std::span<uint64_t, wire::kTargetCounterCount>(counters));
  return counters;
}

const char* state_name(pager::TargetState state) {
  switch (state) {
    case pager::TargetState::kIdle:
      return "idle";
    case pager::TargetState::kAhead:
      return "ahead";
    case pager::TargetState::kFilling:
      return "filling";
    case pager::TargetState::kDisconnected:
      return "disconnected";
    case pager::TargetState::kComplete:
      return "complete";
    case pager::TargetState::kFailed:
      return "failed";
    case pager::TargetState::kClosed:
      return "closed";
  }
  return "failed";
}

}  // namespace

Napi::FunctionReference TargetSessionWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(env, "TargetSession",
                                      {InstanceMethod<&TargetSessionWrap::connect>("connect"),
                                       InstanceMethod<&TargetSessionWrap::fetch_ahead>("fetchAhead"),
                                       InstanceMethod<&TargetSessionWrap::hold_ahead>("holdAhead"),
                                       InstanceMethod<&TargetSessionWrap::take_back>("takeBack"),
                                       InstanceMethod<&TargetSessionWrap::start>("start"),
                                       InstanceMethod<&TargetSessionWrap::serve_demand>("serveDemand"),
                                       InstanceMethod<&TargetSessionWrap::snapshot>("snapshot"),
                                       InstanceMethod<&TargetSessionWrap::close>("close")}));
}

Napi::Value TargetSessionWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[1].As<Napi::Object>();
  auto core = std::make_shared<TargetCoreHolder>();
  core->vm = PreloadListenerWrap::Unwrap(info[0].As<Napi::Object>())->listener();
  const pager::VmMemory* memory = core->vm ? core->vm->memory() : nullptr;
  if (memory == nullptr) {
    throw_error(env, {ErrorCode::kClosed, 0, "the VM's memory is not complete, or its handle is closed"});
    return env.Undefined();
  }
  const std::shared_ptr<Edge> edge = Edge::create(env, options.Get("onEdge").As<Napi::Function>());
  if (!edge) return env.Undefined();
  TargetSessionState state;
  state.edge = OwnedEdge(edge);
  const auto regions = target_regions(options);
  core->region_count = regions.size();
  pager::TargetOptions settings;
  settings.bandwidth_bytes_per_s = static_cast<uint64_t>(number(options, "bandwidthBytesPerS"));
  settings.order = cluster_order(options.Get("order"));
  if (options.Get("tags").IsObject()) {
    const Napi::Object tags = options.Get("tags").As<Napi::Object>();
    const auto key = tag_key(text(tags, "key"));
    if (!key) {
      throw_error(env, key.error());
      return env.Undefined();
    }
    settings.tag_key = key.value();
    settings.tag_paths = texts(tags, "paths");
  }
  settings.has_fetched_ahead = optional_flag(options, "hasFetchedAhead");
  auto session = pager::TargetSession::open(*memory, regions, settings, flag(options, "isResume"),
                                            [edge] { edge->fire(); });
  if (!session) {
    throw_error(env, session.error());
    return env.Undefined();
  }
  core->session = std::move(session).value();
  state.core = std::move(core);
  return make(env, env.GetInstanceData<InstanceData>()->target_session, std::move(state));
}

Napi::Value TargetSessionWrap::connect(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!state_.core) return Task::rejected(env, kClosedHandle);
  if (is_connecting_)
    return Task::rejected(env, {ErrorCode::kAlreadyExists, 0, "a connect is already in progress"});
  auto request = connect_request(info, state_.core->region_count);
  if (!request) return Task::rejected(env, request.error());
  is_connecting_ = true;
  Ref();  // until finish, so that the wrapper is not collected during the task
  return Task::start(
      env,
      [core = state_.core, request = std::move(request).value()]() -> Status {
        auto endpoints = open_endpoints(request);
        if (!endpoints) return endpoints.error();
        return core->session->connect(std::move(endpoints).value());
      },
      [this] {
        is_connecting_ = false;
        Unref();
      });
}

void TargetSessionWrap::fetch_ahead(const Napi::CallbackInfo& info) {
  if (!state_.core) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.core->session->fetch_ahead(); !status)
    throw_error(info.Env(), status.error());
}

void TargetSessionWrap::hold_ahead(const Napi::CallbackInfo& info) {
  if (!state_.core) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.core->session->hold_ahead(); !status)
    throw_error(info.Env(), status.error());
}

Napi::Value TargetSessionWrap::take_back(const Napi::CallbackInfo& info) {
  if (!state_.core) return Task::rejected(info.Env(), kClosedHandle);
  const auto taken = std::make_shared<uint64_t>(0);
  return Task::start(
      info.Env(),
      [core = state_.core, round = info[0].As<Napi::Number>().Uint32Value(), taken]() -> Status {
        const auto pages = core->session->take_back(round);
        if (!pages) return pages.error();
        *taken = pages.value();
        return ok();
      },
      {},
      [taken](Napi::Env env) -> Napi::Value {
        Napi::Object object = Napi::Object::New(env);
        object.Set("pages", static_cast<double>(*taken));
        return object;
      });
}

void TargetSessionWrap::start(const Napi::CallbackInfo& info) {
  if (!state_.core) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.core->session->start(); !status) throw_error(info.Env(), status.error());
}

void TargetSessionWrap::serve_demand(const Napi::CallbackInfo& info) {
  if (!state_.core) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.core->session->serve_demand(); !status) {
    throw_error(info.Env(), status.error());
  }
}

Napi::Value TargetSessionWrap::snapshot(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const pager::TargetSession* session = state_.core ? state_.core->session.get() : nullptr;
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", session != nullptr ? state_name(session->state()) : "closed");
  object.Set("failure", failure_object(env, session != nullptr ? session->failure() : state_.final_failure));
  object.Set("counters",
             counters_array(env, session != nullptr ? counters_of(*session) : state_.final_counters));
  return object;
}

/// A second close while the first is in progress waits for the same result.
Napi::Value TargetSessionWrap::close(const Napi::CallbackInfo& info) {
  if (!state_.core) return Task::start(info.Env(), [] { return ok(); });
  Ref();
  return Task::start(
      info.Env(),
      [core = state_.core] {
        core->session->close();
        return ok();
      },
      [this] {
        if (state_.core) {
          state_.final_counters = counters_of(*state_.core->session);
          state_.final_failure = state_.core->session->failure();
          state_.core.reset();
          state_.edge.close();
        }
        Unref();
      });
}

}  // namespace vmigrate::addon
