#include <algorithm>

#include "addon/handles.hpp"
#include "addon/image_parts.hpp"
#include "addon/task.hpp"

namespace vmigrate::addon {

namespace {

std::vector<uint64_t> counters_of(const pager::ImageCapture& capture) {
  std::vector<uint64_t> counters(wire::kImageCounterCount);
  capture.counters(std::span<uint64_t, wire::kImageCounterCount>(counters));
  return counters;
}

}  // namespace

Napi::FunctionReference ImageCaptureWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(
      env, "ImageCapture",
      {InstanceMethod<&ImageCaptureWrap::arm>("arm"), InstanceMethod<&ImageCaptureWrap::protect>("protect"),
       InstanceMethod<&ImageCaptureWrap::seal>("seal"), InstanceMethod<&ImageCaptureWrap::sweep>("sweep"),
       InstanceMethod<&ImageCaptureWrap::resume>("resume"),
       InstanceMethod<&ImageCaptureWrap::add_clone>("addClone"),
       InstanceMethod<&ImageCaptureWrap::remove_clone>("removeClone"),
       InstanceMethod<&ImageCaptureWrap::touched>("touched"),
       InstanceMethod<&ImageCaptureWrap::snapshot>("snapshot"),
       InstanceMethod<&ImageCaptureWrap::close>("close"),
       InstanceMethod<&ImageCaptureWrap::leave>("leave")}));
}

Napi::Value ImageCaptureWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[1].As<Napi::Object>();
  auto holder = std::make_shared<ImageHolder>();
  pager::ImageConfig config;
  if (!info[0].IsNull()) {
    holder->parent = complete_vm(info[0]);
    if (!holder->parent) {
      throw_error(env, kNoMemory);
      return env.Undefined();
    }
    config.parent = holder->parent->memory();
  }
  const std::shared_ptr<Edge> edge = Edge::create(env, options.Get("onEdge").As<Napi::Function>());
  if (!edge) return env.Undefined();
  ImageCaptureState state;
  state.edge = OwnedEdge(edge);
  config.source = region_files(options, "source");
  config.image = target_regions(options, "image");
  config.resume = flag(options, "isResume");
  config.on_edge = [edge] { edge->fire(); };
  auto capture = pager::ImageCapture::open(std::move(config));
  if (!capture) {
    throw_error(env, capture.error());
    return env.Undefined();
  }
  holder->capture = std::move(capture).value();
  state.holder = std::move(holder);
  return make(env, env.GetInstanceData<InstanceData>()->image_capture, std::move(state));
}

Napi::Value ImageCaptureWrap::release_vm(const Napi::CallbackInfo& info) {
  auto vm = complete_vm(info[0]);
  if (!vm) return Task::rejected(info.Env(), kNoMemory);
  return Task::start(info.Env(), [vm] { return pager::release_vm(*vm->memory()); });
}

Napi::Value ImageCaptureWrap::run(Napi::Env env, Step step) {
  if (!state_.holder) return Task::rejected(env, kClosedHandle);
  return Task::start(env, [holder = state_.holder, step] { return (holder->capture.get()->*step)(); });
}

Napi::Value ImageCaptureWrap::arm(const Napi::CallbackInfo& info) {
  return run(info.Env(), &pager::ImageCapture::arm);
}

Napi::Value ImageCaptureWrap::protect(const Napi::CallbackInfo& info) {
  return run(info.Env(), &pager::ImageCapture::protect);
}

Napi::Value ImageCaptureWrap::seal(const Napi::CallbackInfo& info) {
  if (!state_.holder) return Task::rejected(info.Env(), kClosedHandle);
  const auto when = info[0].As<Napi::Boolean>().Value() ? pager::Sweep::kLater : pager::Sweep::kAtOnce;
  return Task::start(info.Env(), [holder = state_.holder, when] { return holder->capture->seal(when); });
}

Napi::Value ImageCaptureWrap::sweep(const Napi::CallbackInfo& info) {
  return run(info.Env(), &pager::ImageCapture::sweep);
}

Napi::Value ImageCaptureWrap::resume(const Napi::CallbackInfo& info) {
  return run(info.Env(), &pager::ImageCapture::resume);
}

void ImageCaptureWrap::add_clone(const Napi::CallbackInfo& info) {
  if (!state_.holder) return throw_error(info.Env(), kClosedHandle);
  auto vm = complete_vm(info[0]);
  if (!vm) return throw_error(info.Env(), kNoMemory);
  if (const Status added = state_.holder->capture->add_clone(*vm->memory()); !added) {
    return throw_error(info.Env(), added.error());
  }
  state_.holder->clones.push_back(std::move(vm));
}

void ImageCaptureWrap::remove_clone(const Napi::CallbackInfo& info) {
  if (!state_.holder) return;
  const auto vm = PreloadListenerWrap::Unwrap(info[0].As<Napi::Object>())->listener();
  auto& clones = state_.holder->clones;
  const auto found = std::find(clones.begin(), clones.end(), vm);
  if (!vm || found == clones.end()) return;
  state_.holder->capture->remove_clone(*vm->memory());
  clones.erase(found);
}

/// Nothing once it is closed.
Napi::Value ImageCaptureWrap::touched(const Napi::CallbackInfo& info) {
  if (!state_.holder) return cluster_array(info.Env(), {});
  return cluster_array(info.Env(), state_.holder->capture->touched());
}

Napi::Value ImageCaptureWrap::snapshot(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const pager::ImageCapture* capture = state_.holder ? state_.holder->capture.get() : nullptr;
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", capture != nullptr ? image_state_name(capture->state()) : "closed");
  object.Set("failure", failure_object(env, capture != nullptr ? capture->failure() : state_.final_failure));
  object.Set("counters",
             counters_array(env, capture != nullptr ? counters_of(*capture) : state_.final_counters));
  return object;
}

/// A second end while the first is in progress waits for the same result.
Napi::Value ImageCaptureWrap::finish(Napi::Env env, End end) {
  if (!state_.holder) return Task::start(env, [] { return ok(); });
  Ref();
  return Task::start(
      env,
      [holder = state_.holder, end] {
        (holder->capture.get()->*end)();
        return ok();
      },
      [this] {
        if (state_.holder) {
          state_.final_counters = counters_of(*state_.holder->capture);
          state_.final_failure = state_.holder->capture->failure();
          state_.holder.reset();
          state_.edge.close();
        }
        Unref();
      });
}

Napi::Value ImageCaptureWrap::close(const Napi::CallbackInfo& info) {
  return finish(info.Env(), &pager::ImageCapture::close);
}

Napi::Value ImageCaptureWrap::leave(const Napi::CallbackInfo& info) {
  return finish(info.Env(), &pager::ImageCapture::leave);
}

}  // namespace vmigrate::addon
