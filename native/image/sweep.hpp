#pragma once

#include "image/copier.hpp"

namespace vmigrate::pager {

/// The thread that copies whatever nobody has asked for, from front to back. run() is its whole life.
class SweepThread {
 public:
  SweepThread(ImageCore& core, ParentGuard& guard);
  void run();

 private:
  bool sweep_region(uint32_t region_index);

  ImageCore& core_;
  ImageCopier copier_;
};

}  // namespace vmigrate::pager
