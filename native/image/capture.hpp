#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "image/serve/clone_mapper.hpp"
#include "image/serve/state.hpp"
#include "memory/region_config.hpp"
#include "source/region_reader.hpp"
#include "vm/memory.hpp"

namespace vmigrate::pager {

enum class Sweep : uint8_t { kAtOnce, kLater };

struct ImageConfig {
  /// Must outlive the capture. nullptr: there is no process whose writes must be held back.
  const VmMemory* parent = nullptr;
  std::vector<RegionFileConfig> source;   ///< the parent's files
  std::vector<TargetRegionConfig> image;  ///< one per source file, with the same length and page size
  bool resume = false;                    ///< take over the presence maps
  std::function<void()> on_edge;          ///< as for TargetSession::open
};

/// Captures an image of a running VM, and serves the clones that run on the image while it fills
/// (docs/PAGE_STATES.md, "Images"). It owns its threads: one for faults and one that sweeps. The threads end
/// when the image is complete. Thread-safe for its callers.
class ImageCapture {
 public:
  static Result<std::unique_ptr<ImageCapture>> open(ImageConfig config);
  /// Calls leave() unless close or leave was called before.
  virtual ~ImageCapture() = default;

  /// Call it while the parent runs. Registers the parent's ranges, write-protects them piece by piece, then
  /// protects again the pages that were written meanwhile. Takes some 25 us a MiB. kUnsupported where the
  /// kernel cannot do this.
  virtual Status arm() = 0;
  /// Call it while the parent is stopped. Protects the pages that were written since the last pass.
  virtual Status protect() = 0;
  /// Like protect, and from here on each write of the parent waits until its page is copied. With kLater only
  /// the pages that the parent and the clones ask for are copied until sweep() is called.
  virtual Status seal(Sweep when = Sweep::kAtOnce) = 0;
  /// After seal: copies the remaining pages as well. Idempotent.
  virtual Status sweep() = 0;
  /// With the option `resume`, from kIdle: continues a capture that an earlier process sealed.
  virtual Status resume() = 0;
  /// One region of the image as other hosts may read it, for SourceSession; from seal on it has content. The
  /// capture must outlive the reader, and not be left or closed while the reader is read. nullptr: there is
  /// no such region.
  virtual std::unique_ptr<RegionReader> reader(uint32_t region_index) = 0;
  /// `memory` must be complete, registered for missing and minor, map the image's regions in order, and
  /// outlive its removal. If the image is already complete, the ranges are unregistered at once.
  virtual Status add_clone(const VmMemory& memory) = 0;
  /// After this call the clone's descriptors are not touched. Its outstanding faults keep waiting.
  virtual void remove_clone(const VmMemory& memory) = 0;
  /// Ends the threads. If the image is not complete, the parent is released first. Idempotent.
  virtual void close() = 0;
  /// Ends the threads and releases no process, so that the next daemon can resume.
  virtual void leave() = 0;

  /// The clusters (memory/touch_order.hpp) that clones have touched so far, in the order of the first
  /// touches. Nothing is recorded once the image is complete, because the kernel serves the clones then.
  virtual std::vector<uint32_t> touched() const = 0;
  virtual ImageState state() const = 0;
  virtual std::optional<Error> failure() const = 0;
  virtual void counters(std::span<uint64_t, wire::kImageCounterCount> out) const = 0;
};

}  // namespace vmigrate::pager
