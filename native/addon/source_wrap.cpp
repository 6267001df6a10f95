#include "addon/chunk_digests.hpp"
#include "addon/handles.hpp"
#include "addon/task.hpp"

namespace vmigrate::addon {

namespace {

std::vector<uint64_t> counters_of(const pager::SourceSession& session) {
  std::vector<uint64_t> counters(wire::kSourceCounterCount);
  session.counters(std::span<uint64_t, wire::kSourceCounterCount>(counters));
  return counters;
}

/// The readers of a capture's image, or of one that is read from another host.
Status find_readers(Napi::Env env, const Napi::Object& image, std::vector<pager::SourceRegionConfig>& regions,
                    SourceSessionState& state) {
  const bool is_fetch = image.InstanceOf(env.GetInstanceData<InstanceData>()->image_fetch.Value());
  if (is_fetch)
    state.fetch = ImageFetchWrap::Unwrap(image)->holder();
  else
    state.image = ImageCaptureWrap::Unwrap(image)->holder();
  if (!state.fetch && !state.image) return kClosedHandle;
  for (uint32_t i = 0; i < regions.size(); ++i) {
    state.readers.push_back(is_fetch ? state.fetch->fetch->reader(i) : state.image->capture->reader(i));
    regions[i].reader = state.readers.back().get();
    if (regions[i].reader == nullptr)
      return Error{ErrorCode::kInvalidArgument, 0, "the image has fewer regions"};
  }
  return ok();
}

}  // namespace

Napi::FunctionReference SourceSessionWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(
      env, "SourceSession",
      {InstanceMethod<&SourceSessionWrap::keys>("keys"), InstanceMethod<&SourceSessionWrap::scan>("scan"),
       InstanceMethod<&SourceSessionWrap::note_dirty>("noteDirty"),
       InstanceMethod<&SourceSessionWrap::has_changed_since_last>("hasChangedSinceLast"),
       InstanceMethod<&SourceSessionWrap::digest_chunks>("digestChunks"),
       InstanceMethod<&SourceSessionWrap::snapshot>("snapshot"),
       InstanceMethod<&SourceSessionWrap::close>("close")}));
}

Napi::Value SourceSessionWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[1].As<Napi::Object>();
  // Held by a shared_ptr, because a std::function must be copyable.
  auto state = std::make_shared<SourceSessionState>();
  state->listener = DataListenerWrap::Unwrap(info[0].As<Napi::Object>())->listener(text(options, "provider"));
  if (!state->listener)
    return Task::rejected(env, {ErrorCode::kClosed, 0, "the listener does not listen for this provider"});
  const auto parsed = credentials(options);
  if (!parsed) return Task::rejected(env, parsed.error());
  auto clone = source_clone(options);
  if (!info[2].IsNull()) {
    state->clone = PreloadListenerWrap::Unwrap(info[2].As<Napi::Object>())->listener();
    if (!state->clone) return Task::rejected(env, kClosedHandle);
  }
  if (!info[4].IsNull()) {
    state->tracked = PreloadListenerWrap::Unwrap(info[4].As<Napi::Object>())->listener();
    if (!state->tracked) return Task::rejected(env, kClosedHandle);
  }
  auto regions = source_regions(options);
  if (!info[3].IsNull()) {
    if (auto status = find_readers(env, info[3].As<Napi::Object>(), regions, *state); !status)
      return Task::rejected(env, status.error());
  }
  // Runs as a task, because registering a big VM's memory with an RDMA device takes seconds.
  return Task::start(
      env,
      [state, parsed = parsed.value(), regions = std::move(regions), clone]() mutable -> Status {
        if (state->clone) clone->memory = state->clone->memory();
        const pager::VmMemory* tracked = state->tracked ? state->tracked->memory() : nullptr;
        if (state->tracked && tracked == nullptr)
          return Error{ErrorCode::kClosed, 0, "the VM's memory is not complete"};
        auto session =
            pager::SourceSession::open(*state->listener, parsed, regions, clone ? &*clone : nullptr, tracked);
        if (!session) return session.error();
        state->session = std::move(session).value();
        state->use = OwnedSourceUse(*state->session);
        return ok();
      },
      {},
      [state](Napi::Env result_env) {
        return make(result_env, result_env.GetInstanceData<InstanceData>()->source_session,
                    std::move(*state));
      });
}

Napi::Value SourceSessionWrap::release_tracked(const Napi::CallbackInfo& info) {
  auto vm = PreloadListenerWrap::Unwrap(info[0].As<Napi::Object>())->listener();
  if (!vm || vm->memory() == nullptr) return Task::rejected(info.Env(), kClosedHandle);
  return Task::start(info.Env(), [vm] {
    pager::WriteTracker::release(*vm->memory());
    return ok();
  });
}

Napi::Value SourceSessionWrap::keys(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array array = Napi::Array::New(env);
  if (!state_.session) return array;
  uint32_t count = 0;
  for (const pager::SourceRegionKeys& keys : state_.session->keys()) {
    Napi::Object pair = Napi::Object::New(env);
    pair.Set("ram", to_hex(keys.ram));
    pair.Set("dataMap", to_hex(keys.data_map));
    if (keys.presence.length_bytes != 0) pair.Set("presence", to_hex(keys.presence));
    if (keys.dirty_map.length_bytes != 0) pair.Set("dirtyMap", to_hex(keys.dirty_map));
    array.Set(count++, pair);
  }
  return array;
}

void SourceSessionWrap::scan(const Napi::CallbackInfo& info) {
  if (!state_.session) return throw_error(info.Env(), kClosedHandle);
  if (const Status status = state_.session->scan(); !status) throw_error(info.Env(), status.error());
}

Napi::Value SourceSessionWrap::note_dirty(const Napi::CallbackInfo& info) {
  if (!state_.session) return Task::rejected(info.Env(), kClosedHandle);
  const auto round = std::make_shared<pager::DirtyMaps::Round>();
  return Task::start(
      info.Env(),
      [use = state_.use.get(), is_last = info[0].As<Napi::Boolean>().Value(), round]() -> Status {
        const auto noted = use->note_dirty(is_last);
        if (!noted) return noted.error();
        *round = noted.value();
        return ok();
      },
      {},
      [round](Napi::Env env) -> Napi::Value {
        Napi::Object object = Napi::Object::New(env);
        object.Set("round", round->number);
        object.Set("dirtyPages", static_cast<double>(round->page_count));
        object.Set("againPages", static_cast<double>(round->again_count));
        return object;
      });
}

Napi::Value SourceSessionWrap::has_changed_since_last(const Napi::CallbackInfo& info) {
  if (!state_.session) return Task::rejected(info.Env(), kClosedHandle);
  const auto has_changed = std::make_shared<bool>(false);
  return Task::start(
      info.Env(),
      [use = state_.use.get(), has_changed]() -> Status {
        const auto looked = use->has_changed_since_last();
        if (!looked) return looked.error();
        *has_changed = looked.value();
        return ok();
      },
      {}, [has_changed](Napi::Env env) -> Napi::Value { return Napi::Boolean::New(env, *has_changed); });
}

Napi::Value SourceSessionWrap::digest_chunks(const Napi::CallbackInfo& info) {
  if (!state_.session) return Task::rejected(info.Env(), kClosedHandle);
  return digest_later(info, 0, [use = state_.use.get()](const memory::ChunkRequest& request) {
    return use->digest_chunks(request);
  });
}

Napi::Value SourceSessionWrap::snapshot(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object object = Napi::Object::New(env);
  object.Set("counters",
             counters_array(env, state_.session ? counters_of(*state_.session) : state_.final_counters));
  object.Set("failure",
             failure_object(env, state_.session ? state_.session->failure() : state_.final_failure));
  return object;
}

/// The handle is closed at once. Releasing the memory that a device has registered takes time, so a task does
/// that.
Napi::Value SourceSessionWrap::close(const Napi::CallbackInfo& info) {
  if (!state_.session) return Task::start(info.Env(), [] { return ok(); });
  state_.final_counters = counters_of(*state_.session);
  state_.final_failure = state_.session->failure();
  auto ending = std::make_shared<SourceSessionState>();
  ending->listener = std::move(state_.listener);
  ending->clone = std::move(state_.clone);
  ending->tracked = std::move(state_.tracked);
  ending->image = std::move(state_.image);
  ending->fetch = std::move(state_.fetch);
  ending->readers = std::move(state_.readers);
  ending->session = std::move(state_.session);
  ending->use = std::move(state_.use);
  return Task::start(info.Env(), [ending] {
    ending->use.end();
    ending->session.reset();
    ending->readers.clear();
    ending->image.reset();
    ending->fetch.reset();
    ending->clone.reset();
    ending->tracked.reset();
    ending->listener.reset();
    return ok();
  });
}

}  // namespace vmigrate::addon
