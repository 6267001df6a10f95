#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "memory/region_config.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

///   kIdle --arm--> kArming --> kArmed --seal--> kCopying --last page--> kComplete
///     `------------------------ resume ------------´
/// Any of the middle ones may become kFailed; kClosed follows close and leave from all but the last two.
enum class ImageState : uint32_t {
  kIdle = 1,
  kArming,    ///< the parent runs; its memory is being protected, what it writes is noted
  kArmed,     ///< all of it was protected once
  kCopying,   ///< the image's contents are fixed: what the parent held at seal
  kComplete,  ///< every page is in the image; nobody is registered any more, threads have ended
  kFailed,  ///< failure() says why. The parent was let go and runs on; clones wait for pages that are missing
  kClosed,
};

enum class Sweep : uint8_t { kAtOnce, kLater };

struct ImageConfig {
  /// Must outlive the capture. nullptr: nobody's writes have to be held back.
  const VmMemory* parent = nullptr;
  std::vector<RegionFileConfig> source;   ///< the parent's files
  std::vector<TargetRegionConfig> image;  ///< as many, with the same lengths and page sizes
  bool resume = false;                    ///< take presence maps over
  std::function<void()> on_edge;          ///< as TargetSession::open's
};

/// Takes an image of a running VM and serves clones that run on it while it fills (docs/PAGE_STATES.md,
/// "Images"). Owns its threads, one for faults and one that sweeps; they end when the image is complete.
/// Thread-safe for its callers.
class ImageCapture {
 public:
  static Result<std::unique_ptr<ImageCapture>> open(ImageConfig config);
  /// leave(), if nothing else was called before.
  virtual ~ImageCapture() = default;

  /// The parent runs: registers its ranges, protects them piece by piece, then once more what was written
  /// meanwhile. Takes some 25 us a MiB. kUnsupported where the kernel cannot.
  virtual Status arm() = 0;
  /// The parent stands still: protects what was written since.
  virtual Status protect() = 0;
  /// protect, and from there on no write of the parent gets through before its page is copied. With kLater
  /// only what parent and clones ask for is copied until sweep() is called.
  virtual Status seal(Sweep when = Sweep::kAtOnce) = 0;
  /// After seal, to copy the rest as well. Idempotent.
  virtual Status sweep() = 0;
  /// With resume, from kIdle: what seal was followed by in an earlier process.
  virtual Status resume() = 0;
  /// `memory` must be complete, registered for missing and minor, map the image's regions in order, and
  /// outlive its removal. After completion its ranges are unregistered at once.
  virtual Status add_clone(const VmMemory& memory) = 0;
  /// After this its descriptors are not touched. Faults that it has wait.
  virtual void remove_clone(const VmMemory& memory) = 0;
  /// Ends the threads. Not yet complete: the parent is let go first. Idempotent.
  virtual void close() = 0;
  /// Ends the threads and lets nobody go: the next process resumes.
  virtual void leave() = 0;

  virtual ImageState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual void counters(std::span<uint64_t, wire::kImageCounterCount> out) const = 0;
};

/// Unregisters every range of a VM, piece by piece, and wakes whoever waits. What is gone is as good.
Status release_vm(const VmMemory& memory);

}  // namespace vmigrate::pager
