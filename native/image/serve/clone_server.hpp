#pragma once

#include <cstdint>
#include <vector>

#include "base/page_key.hpp"
#include "base/unique_fd.hpp"
#include "image/serve/clone_mapper.hpp"
#include "image/serve/command_slot.hpp"
#include "image/serve/supply.hpp"
#include "image/serve/wait_list.hpp"

namespace vmigrate::pager {

/// The thread that reads the faults of all clones, asks the supply for the pages they wait for, and maps
/// these. No other thread touches clones. run() is the thread's whole life. Everything else here is called on
/// this thread (by a CommandSlot), or while it does not exist.
class CloneServer final : private Watcher {
 public:
  CloneServer(ImageCore& core, Supply& supply);
  /// Call it before run(), on any thread.
  Status open();
  void run();
  CommandSlot& commands() { return commands_; }

  /// From now on clones are served.
  Status begin_copying();
  Status add_clone(const VmMemory& clone);
  void remove_clone(const VmMemory& clone);

 private:
  /// A process whose faults are read here. Slots are reused; epoll knows a process by its index.
  struct Clone {
    const VmMemory* memory = nullptr;  ///< nullptr: the slot is free
    bool is_watched = false;
  };

  Status watch(int fd, uint32_t tag) override;
  void unwatch(int fd) override;
  Status add_descriptor(int fd, uint64_t key);
  Status serve_clone(uint32_t clone_index);
  void ignore(uint32_t clone_index);
  void read_faults(uint32_t clone_index, uint32_t descriptor_index);
  void serve(uint32_t clone_index, PageKey key, uint64_t read_ns);
  bool must_go_on();
  void serve_waits();
  void sleep_and_read(int timeout_ms);
  void finish();

  ImageCore& core_;
  Supply& supply_;
  CloneMapper mapper_;
  std::vector<Clone> clones_;
  WaitList waits_;
  UniqueFd epoll_;
  bool is_copying_ = false;
  CommandSlot commands_;
};

}  // namespace vmigrate::pager
