#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "addon/edge.hpp"
#include "addon/wrap.hpp"
#include "image/capture.hpp"
#include "image/digests/digests.hpp"
#include "image/fetch.hpp"
#include "multicast/pacer.hpp"
#include "multicast/sender.hpp"
#include "source/source.hpp"
#include "target/target.hpp"
#include "transport/transport.hpp"
#include "vm/preload_listener.hpp"

namespace vmigrate::addon {

// The handle classes. Owners hold their dependencies by shared_ptr, so that environments may end, and
// the collector may run, in any order. A handle on which others still depend refuses an explicit close. Only
// the JS thread touches the state; Tasks hold references of their own.

/// A VM's memory as JavaScript sees it: the listener that the preload of its QEMU talks to.
struct PreloadListenerState {
  std::shared_ptr<pager::PreloadListener> listener;  ///< nullptr once closed
  OwnedEdge edge;
};

class PreloadListenerWrap final : public Wrap<PreloadListenerWrap, PreloadListenerState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value listen(const Napi::CallbackInfo& info);
  static Napi::Value adopt(const Napi::CallbackInfo& info);
  const std::shared_ptr<pager::PreloadListener>& listener() const { return state_.listener; }

 private:
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  void hold_trim(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
};

struct DataListenerState {
  struct Served {
    const transport::Provider* provider;
    std::shared_ptr<transport::Listener> listener;  ///< nullptr once closed
    transport::Address address;
  };
  std::vector<Served> served;
};

/// Listeners of some providers, which are opened and closed together.
class DataListenerWrap final : public Wrap<DataListenerWrap, DataListenerState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);
  /// nullptr if there is no listener for this provider, or if it is closed.
  std::shared_ptr<transport::Listener> listener(const std::string& provider) const;

 private:
  Napi::Value addresses(const Napi::CallbackInfo& info);
  Napi::Value is_lost(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
};

struct ImageHolder;
struct ImageFetchHolder;

/// Lets tasks use a session that its handle owns. `end` waits for one that does.
class SourceUse {
 public:
  explicit SourceUse(pager::SourceSession& session) : session_(&session) {}
  Result<std::vector<std::byte>> digest_chunks(const memory::ChunkRequest& request) {
    const std::lock_guard lock(mutex_);
    if (session_ == nullptr) return kClosedHandle;
    return session_->digest_chunks(request);
  }
  Result<pager::DirtyMaps::Round> note_dirty(bool is_last) {
    const std::lock_guard lock(mutex_);
    if (session_ == nullptr) return kClosedHandle;
    return session_->note_dirty(is_last);
  }
  Result<bool> has_changed_since_last() {
    const std::lock_guard lock(mutex_);
    if (session_ == nullptr) return kClosedHandle;
    return session_->has_changed_since_last();
  }
  void end() {
    const std::lock_guard lock(mutex_);
    session_ = nullptr;
  }

 private:
  std::mutex mutex_;
  pager::SourceSession* session_;
};

/// Ends the use when the owner ends.
class OwnedSourceUse {
 public:
  OwnedSourceUse() = default;
  explicit OwnedSourceUse(pager::SourceSession& session) : use_(std::make_shared<SourceUse>(session)) {}
  OwnedSourceUse(OwnedSourceUse&&) = default;
  OwnedSourceUse& operator=(OwnedSourceUse&& other) {
    end();
    use_ = std::move(other.use_);
    return *this;
  }
  ~OwnedSourceUse() { end(); }
  const std::shared_ptr<SourceUse>& get() const { return use_; }
  void end() {
    if (use_) use_->end();
    use_.reset();
  }

 private:
  std::shared_ptr<SourceUse> use_;
};

struct SourceSessionState {
  std::shared_ptr<transport::Listener> listener;  ///< outlives `session`: declared first
  /// As `listener`; the clone whose process is read, or nullptr.
  std::shared_ptr<pager::PreloadListener> clone;
  /// As `listener`; the VM whose writes are tracked, or nullptr.
  std::shared_ptr<pager::PreloadListener> tracked;
  /// As `listener`; the capture whose image is served, or nullptr, and its readers.
  std::shared_ptr<ImageHolder> image;
  /// The same, for an image that is read from another host.
  std::shared_ptr<ImageFetchHolder> fetch;
  std::vector<std::unique_ptr<pager::RegionReader>> readers;
  std::unique_ptr<pager::SourceSession> session;  ///< nullptr once closed
  OwnedSourceUse use;                             ///< of `session`
  std::vector<uint64_t> final_counters;
  std::optional<Error> final_failure;
};

class SourceSessionWrap final : public Wrap<SourceSessionWrap, SourceSessionState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);
  static Napi::Value release_tracked(const Napi::CallbackInfo& info);

 private:
  Napi::Value keys(const Napi::CallbackInfo& info);
  void scan(const Napi::CallbackInfo& info);
  Napi::Value note_dirty(const Napi::CallbackInfo& info);
  Napi::Value has_changed_since_last(const Napi::CallbackInfo& info);
  Napi::Value digest_chunks(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
};

/// A session and the VM that it fills, in the order in which they must be destroyed (last member first).
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
  void fetch_ahead(const Napi::CallbackInfo& info);
  void hold_ahead(const Napi::CallbackInfo& info);
  Napi::Value take_back(const Napi::CallbackInfo& info);
  void start(const Napi::CallbackInfo& info);
  void serve_demand(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  bool is_connecting_ = false;
};

struct ImageDigestsState {
  std::shared_ptr<pager::ImageDigests> digests;  ///< nullptr once closed; a fetch may have it too
};

class ImageDigestsWrap final : public Wrap<ImageDigestsWrap, ImageDigestsState> {
 public:
  using Wrap::Wrap;
  const std::shared_ptr<pager::ImageDigests>& digests() const { return state_.digests; }
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  Napi::Value known(const Napi::CallbackInfo& info);
  Napi::Value read(const Napi::CallbackInfo& info);
  Napi::Value make_digests(const Napi::CallbackInfo& info);
  void accept(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
};

/// A fetch and the clones that it serves, in the order in which they must be destroyed (last member first).
struct ImageFetchHolder {
  std::vector<std::shared_ptr<pager::PreloadListener>> clones;  ///< JS thread
  std::unique_ptr<pager::ImageFetch> fetch;
  size_t region_count = 0;
};

struct ImageFetchState {
  std::shared_ptr<ImageFetchHolder> holder;  ///< nullptr once closed
  OwnedEdge edge;
  std::vector<uint64_t> final_counters;
  std::optional<Error> final_failure;
  pager::MulticastSnapshot final_multicast;
};

class ImageFetchWrap final : public Wrap<ImageFetchWrap, ImageFetchState> {
 public:
  using Wrap::Wrap;
  const std::shared_ptr<ImageFetchHolder>& holder() const { return state_.holder; }
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  Napi::Value connect(const Napi::CallbackInfo& info);
  void start(const Napi::CallbackInfo& info);
  void sweep(const Napi::CallbackInfo& info);
  Napi::Value add_near(const Napi::CallbackInfo& info);
  void remove_near(const Napi::CallbackInfo& info);
  Napi::Value nears(const Napi::CallbackInfo& info);
  void add_clone(const Napi::CallbackInfo& info);
  void remove_clone(const Napi::CallbackInfo& info);
  Napi::Value touched(const Napi::CallbackInfo& info);
  Napi::Value check(const Napi::CallbackInfo& info);
  Napi::Value join_multicast(const Napi::CallbackInfo& info);
  Napi::Value multicast(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  bool is_connecting_ = false;
};

struct MulticastSenderState {
  std::shared_ptr<multicast::MulticastSender> sender;
  OwnedEdge edge;
};

class MulticastSenderWrap final : public Wrap<MulticastSenderWrap, MulticastSenderState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  void start(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
};

struct PacerState {
  std::unique_ptr<multicast::Pacer> pacer;
};

/// The pacing of a multicast by itself, for models of large groups.
class PacerWrap final : public Wrap<PacerWrap, PacerState> {
 public:
  using Wrap::Wrap;
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);

 private:
  void report(const Napi::CallbackInfo& info);
  Napi::Value rate(const Napi::CallbackInfo& info);
};

/// A capture and the VMs that it serves, in the order in which they must be destroyed (last member first).
struct ImageHolder {
  std::shared_ptr<pager::PreloadListener> parent;               ///< nullptr: there is no parent
  std::vector<std::shared_ptr<pager::PreloadListener>> clones;  ///< JS thread
  std::unique_ptr<pager::ImageCapture> capture;
};

struct ImageCaptureState {
  std::shared_ptr<ImageHolder> holder;  ///< nullptr once closed
  OwnedEdge edge;
  std::vector<uint64_t> final_counters;
  std::optional<Error> final_failure;
};

class ImageCaptureWrap final : public Wrap<ImageCaptureWrap, ImageCaptureState> {
 public:
  using Wrap::Wrap;
  const std::shared_ptr<ImageHolder>& holder() const { return state_.holder; }
  static Napi::FunctionReference define(Napi::Env env);
  static Napi::Value open(const Napi::CallbackInfo& info);
  static Napi::Value release_vm(const Napi::CallbackInfo& info);

 private:
  using Step = Status (pager::ImageCapture::*)();
  Napi::Value run(Napi::Env env, Step step);
  Napi::Value arm(const Napi::CallbackInfo& info);
  Napi::Value protect(const Napi::CallbackInfo& info);
  Napi::Value seal(const Napi::CallbackInfo& info);
  Napi::Value sweep(const Napi::CallbackInfo& info);
  Napi::Value resume(const Napi::CallbackInfo& info);
  void add_clone(const Napi::CallbackInfo& info);
  void remove_clone(const Napi::CallbackInfo& info);
  Napi::Value touched(const Napi::CallbackInfo& info);
  Napi::Value snapshot(const Napi::CallbackInfo& info);
  using End = void (pager::ImageCapture::*)();
  Napi::Value finish(Napi::Env env, End end);
  Napi::Value close(const Napi::CallbackInfo& info);
  Napi::Value leave(const Napi::CallbackInfo& info);
};

}  // namespace vmigrate::addon
