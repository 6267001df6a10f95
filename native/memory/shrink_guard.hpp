#pragma once

namespace vmigrate::memory {

/// Calls `touch(context)`, which reads mappings of files that others may shorten meanwhile. False: one has
/// been, and `touch` was left where it stood. So it must own nothing, hold no lock and call nothing that
/// does.
bool touch_guarded(void (*touch)(void*), void* context);

}  // namespace vmigrate::memory
