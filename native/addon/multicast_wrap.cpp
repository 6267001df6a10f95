#include "addon/handles.hpp"
#include "addon/multicast_parts.hpp"
#include "addon/task.hpp"
#include "multicast/probe.hpp"

namespace vmigrate::addon {

namespace {

using multicast::ReceiverState;
using multicast::SenderState;

const char* state_name(SenderState state) {
  switch (state) {
    case SenderState::kWaiting:
      return "waiting";
    case SenderState::kSending:
      return "sending";
    case SenderState::kEnded:
      return "ended";
    case SenderState::kFailed:
      return "failed";
    case SenderState::kClosed:
      return "closed";
  }
  return "closed";
}

const char* state_name(ReceiverState state) {
  switch (state) {
    case ReceiverState::kWaiting:
      return "waiting";
    case ReceiverState::kReceiving:
      return "receiving";
    case ReceiverState::kSilent:
      return "silent";
    case ReceiverState::kEnded:
      return "ended";
    case ReceiverState::kFailed:
      return "failed";
  }
  return "failed";
}

std::chrono::milliseconds milliseconds_argument(const Napi::CallbackInfo& info, size_t index) {
  return std::chrono::milliseconds(info[index].As<Napi::Number>().Int64Value());
}

}  // namespace

Napi::Object multicast_object(Napi::Env env, const pager::MulticastSnapshot& snapshot) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", snapshot.has_joined ? state_name(snapshot.state) : "none");
  object.Set("failure", failure_object(env, snapshot.failure));
  const auto set = [&](const char* name, uint64_t value) { object.Set(name, bigint(env, value)); };
  set("receivedBytes", snapshot.received.received_bytes);
  set("receivedDatagrams", snapshot.received.received_datagrams);
  set("pages", snapshot.pages);
  set("lostDatagrams", snapshot.received.lost_datagrams);
  set("repeatedDatagrams", snapshot.received.repeated_datagrams);
  set("rejectedDatagrams", snapshot.received.rejected_datagrams);
  set("evictedPages", snapshot.received.evicted_pages);
  set("sentPages", snapshot.received.sent_pages);
  return object;
}

Napi::Value send_multicast_probe(const Napi::CallbackInfo& info) {
  const auto group = multicast_group(info[0].As<Napi::Object>());
  if (!group) return Task::rejected(info.Env(), group.error());
  return Task::start(info.Env(), [group = group.value(), duration = milliseconds_argument(info, 1)] {
    return multicast::send_probes(group, duration);
  });
}

Napi::Value receive_multicast_probe(const Napi::CallbackInfo& info) {
  const auto group = multicast_group(info[0].As<Napi::Object>());
  if (!group) return Task::rejected(info.Env(), group.error());
  auto largest_bytes = std::make_shared<uint32_t>(0);
  return Task::start(
      info.Env(),
      [group = group.value(), timeout = milliseconds_argument(info, 1), largest_bytes]() -> Status {
        const auto received = multicast::receive_probes(group, timeout);
        if (!received) return received.error();
        *largest_bytes = received.value();
        return ok();
      },
      {}, [largest_bytes](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, *largest_bytes); });
}

Napi::FunctionReference MulticastSenderWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(env, "MulticastSender",
                                      {InstanceMethod<&MulticastSenderWrap::start>("start"),
                                       InstanceMethod<&MulticastSenderWrap::snapshot>("snapshot"),
                                       InstanceMethod<&MulticastSenderWrap::close>("close")}));
}

Napi::Value MulticastSenderWrap::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object options = info[0].As<Napi::Object>();
  const auto group = multicast_group(options.Get("group").As<Napi::Object>());
  if (!group) return Task::rejected(env, group.error());
  const std::shared_ptr<Edge> edge = Edge::create(env, options.Get("onEdge").As<Napi::Function>());
  if (!edge) return env.Undefined();
  // Of the JS thread, but for the sender, which the work sets.
  const auto state = std::make_shared<MulticastSenderState>();
  state->edge = OwnedEdge(edge);
  const auto config_for_work = std::make_shared<multicast::SenderConfig>();
  multicast::SenderConfig& config = *config_for_work;
  config.image = region_files(options, "image");
  config.group = group.value();
  config.bandwidth_bytes_per_s = static_cast<uint64_t>(number(options, "bandwidthBytesPerS"));
  config.order = cluster_order(options.Get("order"));
  config.on_edge = [edge] { edge->fire(); };
  return Task::start(
      env,
      [state, config_for_work]() -> Status {
        auto sender = multicast::MulticastSender::open(std::move(*config_for_work));
        if (!sender) return sender.error();
        state->sender = std::move(sender).value();
        return ok();
      },
      {},
      [state](Napi::Env result_env) {
        return make(result_env, result_env.GetInstanceData<InstanceData>()->multicast_sender,
                    std::move(*state));
      });
}

void MulticastSenderWrap::start(const Napi::CallbackInfo& info) {
  if (const Status status = state_.sender->start(); !status) throw_error(info.Env(), status.error());
}

Napi::Value MulticastSenderWrap::snapshot(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const multicast::MulticastSender& sender = *state_.sender;
  const multicast::SenderCounters counters = sender.counters();
  Napi::Object object = Napi::Object::New(env);
  object.Set("state", state_name(sender.state()));
  object.Set("failure", failure_object(env, sender.failure()));
  Napi::Object counted = Napi::Object::New(env);
  counted.Set("sentBytes", bigint(env, counters.sent_bytes));
  counted.Set("sentPages", bigint(env, counters.sent_pages));
  counted.Set("pagesTotal", bigint(env, counters.pages_total));
  counted.Set("sentDatagrams", bigint(env, counters.sent_datagrams));
  counted.Set("rateBytesPerS", bigint(env, counters.rate_bytes_per_s));
  counted.Set("cpuNs", bigint(env, counters.cpu_ns));
  object.Set("counters", counted);
  const auto members = sender.members();
  Napi::Array array = Napi::Array::New(env, members.size());
  for (uint32_t i = 0; i < members.size(); ++i) {
    Napi::Object member = Napi::Object::New(env);
    member.Set("member", members[i].member);
    member.Set("receivedBytes", bigint(env, members[i].received_bytes));
    member.Set("lostDatagrams", bigint(env, members[i].lost_datagrams));
    member.Set("sentDatagrams", bigint(env, members[i].sent_datagrams));
    array.Set(i, member);
  }
  object.Set("members", array);
  return object;
}

/// The sender itself stays, for its counters. Its files are closed with the handle.
Napi::Value MulticastSenderWrap::close(const Napi::CallbackInfo& info) {
  Ref();
  return Task::start(
      info.Env(),
      [sender = state_.sender] {
        sender->close();
        return ok();
      },
      [this] {
        state_.edge.close();
        Unref();
      });
}

Napi::FunctionReference PacerWrap::define(Napi::Env env) {
  return Napi::Persistent(DefineClass(
      env, "Pacer",
      {InstanceMethod<&PacerWrap::report>("report"), InstanceMethod<&PacerWrap::rate>("rateBytesPerS")}));
}

Napi::Value PacerWrap::open(const Napi::CallbackInfo& info) {
  multicast::PacerOptions options;
  options.limit_bytes_per_s = static_cast<uint64_t>(number(info[0].As<Napi::Object>(), "bandwidthBytesPerS"));
  return make(info.Env(), info.Env().GetInstanceData<InstanceData>()->pacer,
              {std::make_unique<multicast::Pacer>(options)});
}

void PacerWrap::report(const Napi::CallbackInfo& info) {
  const Napi::Object report = info[1].As<Napi::Object>();
  const auto integer = [&](const char* name) { return static_cast<uint64_t>(number(report, name)); };
  state_.pacer->report(info[0].As<Napi::Number>().Uint32Value(),
                       {integer("clockNs"), integer("highestSequence"), integer("receivedDatagrams"),
                        integer("receivedBytes")},
                       static_cast<uint64_t>(info[2].As<Napi::Number>().Int64Value()));
}

Napi::Value PacerWrap::rate(const Napi::CallbackInfo& info) {
  const uint64_t at_ns = static_cast<uint64_t>(info[0].As<Napi::Number>().Int64Value());
  return Napi::Number::New(info.Env(), static_cast<double>(state_.pacer->rate_bytes_per_s(at_ns)));
}

}  // namespace vmigrate::addon
