// The N-API surface. src/native/binding.ts is its only caller: it checks argument types before a call and
// maps errors after it.

#include <napi.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>

#include "addon/chunk_digests.hpp"
#include "addon/handles.hpp"
#include "addon/multicast_parts.hpp"
#include "addon/task.hpp"
#include "memory/region.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::addon {

namespace {

Napi::Value support(const Napi::CallbackInfo& info) {
  const uffd::Support found = uffd::probe();
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("userfaultfdPermitted", found.permitted);
  object.Set("userfaultfdErrno", found.system_errno);
  object.Set("minorShmem", found.minor_shmem);
  object.Set("minorHugetlbfs", found.minor_hugetlbfs);
  object.Set("wpAsync", found.wp_async);
  object.Set("pagemapScan", found.pagemap_scan);
  return object;
}

void create_region_file(const Napi::CallbackInfo& info) {
  const Napi::Object region = info[0].As<Napi::Object>();
  const Status status = memory::Region::create_file(text(region, "path"), u64(region, "lengthBytes"),
                                                    static_cast<uint64_t>(number(region, "pageBytes")));
  if (!status) throw_error(info.Env(), status.error());
}

Napi::Value allocated_bytes(const Napi::CallbackInfo& info) {
  constexpr uint64_t kStatBlockBytes = 512;
  struct stat file {};
  if (::stat(info[0].As<Napi::String>().Utf8Value().c_str(), &file) != 0) {
    throw_error(info.Env(), system_error("stat region file"));
    return info.Env().Undefined();
  }
  return bigint(info.Env(), static_cast<uint64_t>(file.st_blocks) * kStatBlockBytes);
}

/// Locks the file behind a descriptor for as long as the descriptor is open. Returns false if another one
/// holds it.
Napi::Value lock_file(const Napi::CallbackInfo& info) {
  const int fd = info[0].As<Napi::Number>().Int32Value();
  int result = 0;
  do result = ::flock(fd, LOCK_EX | LOCK_NB);
  while (result != 0 && errno == EINTR);
  if (result == 0) return Napi::Boolean::New(info.Env(), true);
  if (errno == EWOULDBLOCK) return Napi::Boolean::New(info.Env(), false);
  throw_error(info.Env(), system_error("flock"));
  return info.Env().Undefined();
}

/// Returns the uid of the process at the other end of a unix socket, as it was when it connected.
Napi::Value peer_user(const Napi::CallbackInfo& info) {
  ucred peer{};
  socklen_t length_bytes = sizeof peer;
  const int fd = info[0].As<Napi::Number>().Int32Value();
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length_bytes) != 0) {
    throw_error(info.Env(), system_error("getsockopt SO_PEERCRED"));
    return info.Env().Undefined();
  }
  return Napi::Number::New(info.Env(), peer.uid);
}

Napi::Value devices(const Napi::CallbackInfo& info) {
  const transport::Provider* provider = transport::find_provider(info[0].As<Napi::String>().Utf8Value());
  auto found = std::make_shared<std::vector<transport::Device>>();
  return Task::start(
      info.Env(),
      [provider, found]() -> Status {
        if (provider == nullptr || provider->devices == nullptr)
          return Error{ErrorCode::kInvalidArgument, 0, "no provider with devices"};
        auto devices = provider->devices();
        if (!devices) return devices.error();
        *found = std::move(devices).value();
        return ok();
      },
      {}, [found](Napi::Env env) { return devices_array(env, *found); });
}

/// Resolves if the host at the other end answers, even if the answer is a refusal.
Napi::Value probe(const Napi::CallbackInfo& info) {
  const Napi::Object peer = info[0].As<Napi::Object>();
  const auto found = provider(peer);
  if (!found) return Task::rejected(info.Env(), found.error());
  return Task::start(
      info.Env(),
      [provider = found.value(), address = address(peer), options = provider_options(peer),
       timeout = std::chrono::milliseconds(info[1].As<Napi::Number>().Int64Value())]() -> Status {
        // Credentials of a session that does not exist.
        const auto answer = provider->connect(address, {}, transport::Channel::kDemand, timeout, options);
        if (answer.ok() || answer.error().code == ErrorCode::kRefused) return ok();
        return answer.error();
      });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new InstanceData{
      PreloadListenerWrap::define(env), DataListenerWrap::define(env),    SourceSessionWrap::define(env),
      TargetSessionWrap::define(env),   ImageCaptureWrap::define(env),    ImageFetchWrap::define(env),
      ImageDigestsWrap::define(env),    MulticastSenderWrap::define(env), PacerWrap::define(env)};
  env.SetInstanceData(data);
  exports.Set("support", Napi::Function::New<support>(env));
  exports.Set("createRegionFile", Napi::Function::New<create_region_file>(env));
  exports.Set("allocatedBytes", Napi::Function::New<allocated_bytes>(env));
  exports.Set("lockFile", Napi::Function::New<lock_file>(env));
  exports.Set("peerUser", Napi::Function::New<peer_user>(env));
  exports.Set("devices", Napi::Function::New<devices>(env));
  exports.Set("probe", Napi::Function::New<probe>(env));
  exports.Set("listenForVm", Napi::Function::New<PreloadListenerWrap::listen>(env));
  exports.Set("adoptVm", Napi::Function::New<PreloadListenerWrap::adopt>(env));
  exports.Set("openDataListener", Napi::Function::New<DataListenerWrap::open>(env));
  exports.Set("openSourceSession", Napi::Function::New<SourceSessionWrap::open>(env));
  exports.Set("openTargetSession", Napi::Function::New<TargetSessionWrap::open>(env));
  exports.Set("digestArrived", Napi::Function::New<digest_arrived>(env));
  exports.Set("openImageCapture", Napi::Function::New<ImageCaptureWrap::open>(env));
  exports.Set("openImageFetch", Napi::Function::New<ImageFetchWrap::open>(env));
  exports.Set("openImageDigests", Napi::Function::New<ImageDigestsWrap::open>(env));
  exports.Set("openMulticastSender", Napi::Function::New<MulticastSenderWrap::open>(env));
  exports.Set("sendMulticastProbe", Napi::Function::New<send_multicast_probe>(env));
  exports.Set("receiveMulticastProbe", Napi::Function::New<receive_multicast_probe>(env));
  exports.Set("openPacer", Napi::Function::New<PacerWrap::open>(env));
  exports.Set("releaseTracked", Napi::Function::New<SourceSessionWrap::release_tracked>(env));
  exports.Set("releaseVm", Napi::Function::New<ImageCaptureWrap::release_vm>(env));
  return exports;
}

}  // namespace

NODE_API_MODULE(vmigrate, init)

}  // namespace vmigrate::addon
