#pragma once

#include <memory>

#include "addon/handles.hpp"

namespace vmigrate::addon {

// What the two ways to fill an image, a capture and a fetch, have in common.

inline const Error kNoMemory{ErrorCode::kClosed, 0,
                             "the VM's memory is not complete, or its handle is closed"};

const char* image_state_name(pager::ImageState state);
/// nullptr unless the VM is complete and its handle is open.
std::shared_ptr<pager::PreloadListener> complete_vm(const Napi::Value& handle);

}  // namespace vmigrate::addon
