#pragma once

namespace vmigrate::memory {

/// Calls `touch(context)`, which reads mappings of files that other processes may shorten meanwhile. Returns
/// false if such a file was shortened; `touch` was then abandoned in the middle. So `touch` must own nothing,
/// hold no lock and call nothing that does.
bool touch_guarded(void (*touch)(void*), void* context);

}  // namespace vmigrate::memory
