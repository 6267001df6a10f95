#pragma once

#include <napi.h>

#include <functional>
#include <optional>
#include <utility>

#include "addon/convert.hpp"

namespace vmigrate::addon {

/// Runs blocking work on libuv's thread pool, behind a promise. `work` captures everything it needs by value
/// or shared ownership, because the handle that started it may be closed or collected meanwhile. `finish`
/// runs on the JS thread before the promise is settled, even if the work failed. If the work has succeeded,
/// `result` makes the value that the promise resolves to. All of them are destroyed before JavaScript runs
/// again.
class Task final : public Napi::AsyncWorker {
 public:
  static Napi::Promise start(Napi::Env env, std::function<Status()> work, std::function<void()> finish = {},
                             std::function<Napi::Value(Napi::Env)> result = {}) {
    auto* task = new Task(env, std::move(work), std::move(finish), std::move(result));
    const Napi::Promise promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

  static Napi::Promise rejected(Napi::Env env, const Error& error) {
    const auto deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(error_object(env, error));
    return deferred.Promise();
  }

 private:
  Task(Napi::Env env, std::function<Status()> work, std::function<void()> finish,
       std::function<Napi::Value(Napi::Env)> result)
      : Napi::AsyncWorker(env, "vmigrate"),
        deferred_(env),
        work_(std::move(work)),
        finish_(std::move(finish)),
        result_(std::move(result)) {}

  void Execute() override {
    if (const Status status = work_(); !status) failure_ = status.error();
  }

  void OnOK() override {
    work_ = nullptr;
    if (finish_) finish_();
    finish_ = nullptr;
    const auto result = std::exchange(result_, nullptr);
    if (!can_run_js()) return;
    if (failure_)
      deferred_.Reject(error_object(Env(), *failure_));
    else
      deferred_.Resolve(result ? result(Env()) : Env().Undefined());
  }

  /// False while the environment is being torn down. It waits for our work, but a promise can no longer be
  /// settled, and the attempt would abort the process.
  bool can_run_js() {
    napi_value probe;
    return napi_create_object(Env(), &probe) == napi_ok &&
           napi_set_named_property(Env(), probe, "probe", probe) == napi_ok;
  }

  Napi::Promise::Deferred deferred_;
  std::function<Status()> work_;
  std::function<void()> finish_;
  std::function<Napi::Value(Napi::Env)> result_;
  std::optional<Error> failure_;
};

}  // namespace vmigrate::addon
