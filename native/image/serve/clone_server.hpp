#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/page_key.hpp"
#include "base/unique_fd.hpp"
#include "image/clones.hpp"
#include "image/command_slot.hpp"
#include "image/copier.hpp"
#include "image/guard.hpp"
#include "image/limits.hpp"

namespace vmigrate::pager {

/// The thread that reads the faults of the parent and of all clones, and copies the pages they wait for. No
/// other thread touches clones. run() is the thread's whole life. Everything else here is called on this
/// thread (by a CommandSlot), or while it does not exist.
class FaultThread {
 public:
  FaultThread(ImageCore& core, ParentGuard& guard);
  /// Call it before run(), on any thread.
  Status open();
  void run();
  CommandSlot& commands() { return commands_; }

  /// From the next fault on, every write of the parent waits until the page is copied, and clones are served.
  Status begin_copying();
  Status add_clone(const VmMemory& clone);
  void remove_clone(const VmMemory& clone);

 private:
  /// A process whose faults are read here. Slots are reused; epoll knows a process by its index.
  struct Faulter {
    const VmMemory* memory = nullptr;  ///< nullptr: the slot is free
    bool is_parent = false;
    bool is_watched = false;
  };
  /// A fault on a page that the sweep has claimed.
  struct Wait {
    uint32_t faulter_index;
    PageKey key;
    uint64_t read_ns;
  };

  Status watch(uint32_t faulter_index);
  Status serve_clone(uint32_t faulter_index);
  void unwatch(uint32_t faulter_index);
  void read_faults(uint32_t faulter_index, uint32_t descriptor_index);
  void give_up_on(uint32_t faulter_index, const Error& error);
  const MappedRange* locate(const VmMemory& memory, uint32_t descriptor_index, HostAddr address) const;
  void serve(uint32_t faulter_index, PageKey key, uint64_t read_ns);
  bool wait_for_sweep(uint32_t faulter_index, PageKey key, uint64_t read_ns);
  void serve_waits();
  bool must_go_on();
  void sleep_and_read();
  void finish();

  ImageCore& core_;
  ParentGuard& guard_;
  CloneMapper mapper_;
  ImageCopier copier_;
  std::vector<Faulter> faulters_;  ///< the parent first, if there is one
  std::array<Wait, kImageWaitsMax> waits_;
  size_t wait_count_ = 0;
  UniqueFd epoll_;
  bool is_copying_ = false;
  CommandSlot commands_;
};

}  // namespace vmigrate::pager
