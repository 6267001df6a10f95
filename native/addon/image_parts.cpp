#include "addon/image_parts.hpp"

namespace vmigrate::addon {

const char* image_state_name(pager::ImageState state) {
  switch (state) {
    case pager::ImageState::kIdle:
      return "idle";
    case pager::ImageState::kArming:
      return "arming";
    case pager::ImageState::kArmed:
      return "armed";
    case pager::ImageState::kCopying:
      return "copying";
    case pager::ImageState::kDisconnected:
      return "disconnected";
    case pager::ImageState::kComplete:
      return "complete";
    case pager::ImageState::kFailed:
      return "failed";
    case pager::ImageState::kClosed:
      return "closed";
  }
  return "failed";
}

std::shared_ptr<pager::PreloadListener> complete_vm(const Napi::Value& handle) {
  auto listener = PreloadListenerWrap::Unwrap(handle.As<Napi::Object>())->listener();
  return listener && listener->memory() != nullptr ? listener : nullptr;
}

}  // namespace vmigrate::addon
