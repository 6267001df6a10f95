#include "addon/handles.hpp"
#include "addon/task.hpp"

namespace vmigrate::addon {

namespace {

uint32_t region_argument(const Napi::CallbackInfo& info) {
  return info[0].As<Napi::Number>().Uint32Value();
}

}  // namespace

Napi::FunctionReference ImageDigestsWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(
      env, "ImageDigests",
      {InstanceMethod<&ImageDigestsWrap::known>("known"), InstanceMethod<&ImageDigestsWrap::read>("read"),
       InstanceMethod<&ImageDigestsWrap::make_digests>("make"),
       InstanceMethod<&ImageDigestsWrap::accept>("accept"),
       InstanceMethod<&ImageDigestsWrap::close>("close")}));
}

Napi::Value ImageDigestsWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  auto opened = pager::ImageDigests::open(digest_regions(info[0].As<Napi::Object>(), "image"));
  if (!opened) {
    throw_error(env, opened.error());
    return env.Undefined();
  }
  return make(env, env.GetInstanceData<InstanceData>()->image_digests, {std::move(opened).value()});
}

Napi::Value ImageDigestsWrap::known(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto known =
      state_.digests ? state_.digests->known(region_argument(info)) : Result<uint64_t>(kClosedHandle);
  if (known) return Napi::Number::New(env, static_cast<double>(known.value()));
  throw_error(env, known.error());
  return env.Undefined();
}

Napi::Value ImageDigestsWrap::read(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const PageRun run = page_run(info, 1);
  const auto bytes = state_.digests ? state_.digests->read(region_argument(info), run.first, run.count)
                                    : Result<std::vector<std::byte>>(kClosedHandle);
  if (bytes)
    return Napi::Buffer<uint8_t>::Copy(env, reinterpret_cast<const uint8_t*>(bytes.value().data()),
                                       bytes.value().size());
  throw_error(env, bytes.error());
  return env.Undefined();
}

Napi::Value ImageDigestsWrap::make_digests(const Napi::CallbackInfo& info) {
  if (!state_.digests) return Task::rejected(info.Env(), kClosedHandle);
  return Task::start(info.Env(), [digests = state_.digests, region_index = region_argument(info),
                                  count = static_cast<uint64_t>(info[1].As<Napi::Number>().Int64Value())] {
    return digests->make(region_index, count);
  });
}

void ImageDigestsWrap::accept(const Napi::CallbackInfo& info) {
  if (!state_.digests) return throw_error(info.Env(), kClosedHandle);
  const Napi::Uint8Array array = info[2].As<Napi::Uint8Array>();
  const PageIndex first{static_cast<uint64_t>(info[1].As<Napi::Number>().Int64Value())};
  const std::span bytes(array.Data(), array.ElementLength());
  if (const Status added = state_.digests->accept(region_argument(info), first, std::as_bytes(bytes));
      !added) {
    throw_error(info.Env(), added.error());
  }
}

void ImageDigestsWrap::close(const Napi::CallbackInfo&) {
  if (state_.digests) state_.digests->stop();
  state_.digests.reset();
}

}  // namespace vmigrate::addon
