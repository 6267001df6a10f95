#include <algorithm>

#include "addon/connect.hpp"
#include "addon/handles.hpp"
#include "addon/image_parts.hpp"
#include "addon/multicast_parts.hpp"
#include "addon/task.hpp"

namespace vmigrate::addon {

namespace {

std::vector<uint64_t> counters_of(const pager::ImageFetch& fetch) {
  std::vector<uint64_t> counters(wire::kImageCounterCount);
  fetch.counters(std::span<uint64_t, wire::kImageCounterCount>(counters));
  return counters;
}

}  // namespace

Napi::FunctionReference ImageFetchWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(
      env, "ImageFetch",
      {InstanceMethod<&ImageFetchWrap::connect>("connect"), InstanceMethod<&ImageFetchWrap::start>("start"),
       InstanceMethod<&ImageFetchWrap::sweep>("sweep"), InstanceMethod<&ImageFetchWrap::add_near>("addNear"),
       InstanceMethod<&ImageFetchWrap::remove_near>("removeNear"),
       InstanceMethod<&ImageFetchWrap::nears>("nears"),
       InstanceMethod<&ImageFetchWrap::add_clone>("addClone"),
       InstanceMethod<&ImageFetchWrap::remove_clone>("removeClone"),
       InstanceMethod<&ImageFetchWrap::check>("check"),
       InstanceMethod<&ImageFetchWrap::join_multicast>("joinMulticast"),
       InstanceMethod<&ImageFetchWrap::multicast>("multicast"),
       InstanceMethod<&ImageFetchWrap::touched>("touched"),
       InstanceMethod<&ImageFetchWrap::snapshot>("snapshot"),
       InstanceMethod<&ImageFetchWrap::close>("close")}));
}

Napi::Value ImageFetchWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[0].As<Napi::Object>();
  pager::ImageFetchConfig config;
  if (!info[1].IsNull()) {
    config.digests = ImageDigestsWrap::Unwrap(info[1].As<Napi::Object>())->digests();
    if (!config.digests) {
      throw_error(env, kClosedHandle);
      return env.Undefined();
    }
  }
  const std::shared_ptr<Edge> edge = Edge::create(env, options.Get("onEdge").As<Napi::Function>());
  if (!edge) return env.Undefined();
  ImageFetchState state;
  state.edge = OwnedEdge(edge);
  config.image = target_regions(options, "image");
  config.options.bandwidth_bytes_per_s = static_cast<uint64_t>(number(options, "bandwidthBytesPerS"));
  config.resume = flag(options, "isResume");
  config.on_edge = [edge] { edge->fire(); };
  auto holder = std::make_shared<ImageFetchHolder>();
  holder->region_count = config.image.size();
  auto fetch = pager::ImageFetch::open(std::move(config));
  if (!fetch) {
    throw_error(env, fetch.error());
    return env.Undefined();
  }
  holder->fetch = std::move(fetch).value();
  state.holder = std::move(holder);
  return make(env, env.GetInstanceData<InstanceData>()->image_fetch, std::move(state));
}

Napi::Value ImageFetchWrap::connect(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!state_.holder) return Task::rejected(env, kClosedHandle);
  if (is_connecting_)
    return Task::rejected(env, {ErrorCode::kAlreadyExists, 0, "a connect is already in progress"});
  auto request = connect_request(info, state_.holder->region_count);
  if (!request) return Task::rejected(env, request.error());
  is_connecting_ = true;
  Ref();  // until finish, so that the wrapper is not collected during the task
  return Task::start(
      env,
      [holder = state_.holder, request = std::move(request).value()]() -> Status {
        auto endpoints = open_endpoints(request);
        if (!endpoints) return endpoints.error();
        return holder->fetch->connect(std::move(endpoints).value());
      },
      [this] {
        is_connecting_ = false;
        Unref();
      });
}

void ImageFetchWrap::start(const Napi::CallbackInfo& info) {
  if (!state_.holder) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.holder->fetch->start(); !status) throw_error(info.Env(), status.error());
}

void ImageFetchWrap::sweep(const Napi::CallbackInfo& info) {
  if (!state_.holder) return throw_error(info.Env(), kClosedHandle);
  const Status status = state_.holder->fetch->sweep(cluster_order(info[0]));
  if (!status) throw_error(info.Env(), status.error());
}

/// The holder and a timeout as for connect, then the holder's id and level.
Napi::Value ImageFetchWrap::add_near(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!state_.holder) return Task::rejected(env, kClosedHandle);
  auto request = connect_request(info, state_.holder->region_count);
  if (!request) return Task::rejected(env, request.error());
  const uint32_t id = info[2].As<Napi::Number>().Uint32Value(),
                 level = info[3].As<Napi::Number>().Uint32Value();
  return Task::start(env,
                     [holder = state_.holder, request = std::move(request).value(), id, level]() -> Status {
                       auto endpoints = open_endpoints(request);
                       if (!endpoints) return endpoints.error();
                       return holder->fetch->add_near(std::move(endpoints).value(), id, level);
                     });
}

void ImageFetchWrap::remove_near(const Napi::CallbackInfo& info) {
  if (state_.holder) state_.holder->fetch->remove_near(info[0].As<Napi::Number>().Uint32Value());
}

Napi::Value ImageFetchWrap::nears(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array array = Napi::Array::New(env);
  if (!state_.holder) return array;
  uint32_t count = 0;
  for (const pager::NearSnapshot& near : state_.holder->fetch->nears()) {
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("id", near.id);
    entry.Set("level", near.level);
    entry.Set("isConnected", near.is_connected);
    entry.Set("bytes", bigint(env, near.bytes));
    entry.Set("failure", failure_object(env, near.failure));
    array.Set(count++, entry);
  }
  return array;
}

void ImageFetchWrap::add_clone(const Napi::CallbackInfo& info) {
  if (!state_.holder) return throw_error(info.Env(), kClosedHandle);
  auto vm = complete_vm(info[0]);
  if (!vm) return throw_error(info.Env(), kNoMemory);
  if (const Status added = state_.holder->fetch->add_clone(*vm->memory()); !added) {
    return throw_error(info.Env(), added.error());
  }
  state_.holder->clones.push_back(std::move(vm));
}

void ImageFetchWrap::remove_clone(const Napi::CallbackInfo& info) {
  if (!state_.holder) return;
  const auto vm = PreloadListenerWrap::Unwrap(info[0].As<Napi::Object>())->listener();
  auto& clones = state_.holder->clones;
  const auto found = std::find(clones.begin(), clones.end(), vm);
  if (!vm || found == clones.end()) return;
  state_.holder->fetch->remove_clone(*vm->memory());
  clones.erase(found);
}

/// Resolves to the number of the first page that is not what its digest says, or to null.
Napi::Value ImageFetchWrap::check(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!state_.holder) return Task::rejected(env, kClosedHandle);
  auto damaged = std::make_shared<std::optional<PageIndex>>();
  return Task::start(
      env,
      [holder = state_.holder, damaged, region_index = info[0].As<Napi::Number>().Uint32Value(),
       run = page_run(info, 1)]() -> Status {
        const auto checked = holder->fetch->check(region_index, run);
        if (!checked) return checked.error();
        *damaged = checked.value();
        return ok();
      },
      {},
      [damaged](Napi::Env result_env) -> Napi::Value {
        if (!*damaged) return result_env.Null();
        return Napi::Number::New(result_env, static_cast<double>(raw(**damaged)));
      });
}

Napi::Value ImageFetchWrap::join_multicast(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!state_.holder) return Task::rejected(env, kClosedHandle);
  const Napi::Object options = info[0].As<Napi::Object>();
  const auto group = multicast_group(options);
  if (!group) return Task::rejected(env, group.error());
  return Task::start(env, [holder = state_.holder, group = group.value(),
                           member = static_cast<uint16_t>(number(options, "member"))] {
    return holder->fetch->join_multicast(group, member);
  });
}

Napi::Value ImageFetchWrap::multicast(const Napi::CallbackInfo& info) {
  return multicast_object(info.Env(),
                          state_.holder ? state_.holder->fetch->multicast() : state_.final_multicast);
}

/// Nothing once it is closed.
Napi::Value ImageFetchWrap::touched(const Napi::CallbackInfo& info) {
  if (!state_.holder) return cluster_array(info.Env(), {});
  return cluster_array(info.Env(), state_.holder->fetch->touched());
}

Napi::Value ImageFetchWrap::snapshot(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const pager::ImageFetch* fetch = state_.holder ? state_.holder->fetch.get() : nullptr;
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", fetch != nullptr ? image_state_name(fetch->state()) : "closed");
  object.Set("failure", failure_object(env, fetch != nullptr ? fetch->failure() : state_.final_failure));
  object.Set("counters", counters_array(env, fetch != nullptr ? counters_of(*fetch) : state_.final_counters));
  return object;
}

/// A second close while the first is in progress waits for the same result.
Napi::Value ImageFetchWrap::close(const Napi::CallbackInfo& info) {
  if (!state_.holder) return Task::start(info.Env(), [] { return ok(); });
  Ref();
  return Task::start(
      info.Env(),
      [holder = state_.holder] {
        holder->fetch->close();
        return ok();
      },
      [this] {
        if (state_.holder) {
          state_.final_counters = counters_of(*state_.holder->fetch);
          state_.final_failure = state_.holder->fetch->failure();
          state_.final_multicast = state_.holder->fetch->multicast();
          // A check that has not ended yet keeps the holder, and must not keep the clones.
          state_.holder->clones.clear();
          state_.holder.reset();
          state_.edge.close();
        }
        Unref();
      });
}

}  // namespace vmigrate::addon
