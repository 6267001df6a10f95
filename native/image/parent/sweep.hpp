#pragma once

#include "image/parent/copier.hpp"

namespace vmigrate::pager {

/// The thread that copies the pages for which no process has asked, from front to back. run() is the thread's
/// whole life.
class SweepThread {
 public:
  SweepThread(ParentMemory& memory, ParentGuard& guard);
  void run();

 private:
  bool sweep_region(uint32_t region_index);

  ParentMemory& memory_;
  ImageCore& core_;
  ImageCopier copier_;
};

}  // namespace vmigrate::pager
