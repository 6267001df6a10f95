#pragma once

#include "image/parent/copier.hpp"
#include "image/parent/guard.hpp"
#include "image/parent/memory.hpp"
#include "image/serve/supply.hpp"
#include "image/serve/wait_list.hpp"

namespace vmigrate::pager {

/// Supplies an image with the memory of a parent on this host, which may run: its writes are held back until
/// their pages have been copied. The sweep (sweep.hpp) copies the pages that nobody has asked for.
class ParentSupply final : public Supply {
 public:
  ParentSupply(ParentMemory& memory, ParentGuard& guard);

  Status open(Watcher& watcher) override;
  void begin() override;
  Status begin_copying() override;
  Answer want(uint32_t region_index, PageIndex page) override;
  void on_ready(uint32_t tag) override;
  void step() override;
  bool has_room() const override { return waits_.has_room(); }
  bool has_ended() const override;
  void let_go() override;

 private:
  void serve(PageKey key, uint64_t read_ns);

  ParentMemory& memory_;
  ImageCore& core_;
  ParentGuard& guard_;
  ImageCopier copier_;
  WaitList waits_;
  bool is_copying_ = false;
};

}  // namespace vmigrate::pager
