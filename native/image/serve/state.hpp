#pragma once

#include <cstdint>

namespace vmigrate::pager {

/// A capture (capture.hpp) and a fetch (fetch.hpp) of an image:
///
///   kIdle --arm--> kArming --> kArmed --seal--> kCopying --last page--> kComplete
///     `-------------------- resume -------------------´
///   kIdle --start------------------------------> kCopying <--> kDisconnected
///
/// Each state between kIdle and kComplete may change to kFailed. close and leave change every state to
/// kClosed, except kComplete and kFailed.
enum class ImageState : uint32_t {
  kIdle = 1,
  kArming,        ///< the parent runs; its memory is being write-protected and its writes are recorded
  kArmed,         ///< the first write-protect pass is complete
  kCopying,       ///< the image's contents are fixed; clones are served and pages arrive
  kDisconnected,  ///< the connection to the holder is lost: clones wait for missing pages
  kComplete,      ///< every page is in the image; no process is registered any more, threads have ended
  kFailed,        ///< failure() says why. The parent was released and runs on; clones wait for missing pages
  kClosed,
};

}  // namespace vmigrate::pager
