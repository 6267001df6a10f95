#pragma once

#include <array>
#include <cstdint>

#include "base/page_key.hpp"
#include "base/result.hpp"
#include "base/types.hpp"
#include "base/watcher.hpp"

namespace vmigrate::pager {

/// Where the pages of an image come from: the parent's memory on this host (parent/supply.hpp), or another
/// holder of the image (holder/supply.hpp). It may have threads of its own, which publish pages too and then
/// call ImageCore::wake_waits. The thread that serves the clones makes all calls below, unless stated
/// otherwise.
class Supply {
 public:
  enum class Answer : uint8_t {
    kHere = 1,  ///< the page's state has changed: look again
    kLater,     ///< another look is due after ImageCore::wake_waits, or after a step() of this supply
    kFailed     ///< the image cannot be filled; the core says why
  };
  virtual ~Supply() = default;

  /// Before the thread runs, on any thread. The watcher outlives the thread; its tags are for on_ready.
  virtual Status open(Watcher& watcher) = 0;
  /// The thread begins.
  virtual void begin() = 0;
  /// From the next call on, clones are served.
  virtual Status begin_copying() = 0;
  /// A clone has touched this page, whatever its state: a hint about what it will touch next.
  virtual void on_fault(PageKey /*key*/, uint64_t /*read_ns*/) {}
  /// A clone waits for this page, which was seen absent.
  virtual Answer want(uint32_t region_index, PageIndex page) = 0;
  /// The descriptor with this tag is readable, and stays so until this call has dealt with it or step() has.
  virtual void on_ready(uint32_t tag) = 0;
  /// Called whenever the thread is awake, before the waits are looked at again.
  virtual void step() = 0;
  /// How long the thread may sleep before the next step(), in ms; -1: until it is woken. Asked last before
  /// the sleep.
  virtual int timeout_ms() const { return -1; }
  /// While this is false no fault is read.
  virtual bool has_room() const { return true; }
  /// Descriptors that are watched also while no fault may be read, because what they announce makes room. -1:
  /// none.
  virtual std::array<int, 2> completion_fds() const { return {-1, -1}; }
  /// No other thread of the supply touches a page or a process any more.
  virtual bool has_ended() const = 0;
  /// Nothing protects or waits any longer, because every page is here or the session is given up.
  virtual void let_go() = 0;
};

}  // namespace vmigrate::pager
