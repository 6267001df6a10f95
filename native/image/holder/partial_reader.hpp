#pragma once

#include "image/serve/core.hpp"
#include "source/region_reader.hpp"

namespace vmigrate::pager {

/// One region of an image that is read from another holder, as further hosts read it from this one: the pages
/// that are here, while the others still come. It looks at a page's state first (acquire, A1) and then at its
/// bytes. A page that is present or zero stays what it is, so nothing can come between the two. Once the
/// image is complete it has every page, also after the session was closed. A session that has failed, or was
/// closed before, serves nobody: its pages may be wrong, or belong to another session soon.
class PartialReader final : public RegionReader {
 public:
  /// The core must outlive the reader.
  PartialReader(ImageCore& core, uint32_t region_index) : core_(core), region_index_(region_index) {}

  bool is_here(uint64_t offset_bytes, uint64_t length_bytes) const override;
  Status read(uint64_t offset_bytes, std::span<std::byte> out) const override;
  /// kInvalidArgument before the image is complete.
  Status each_data_run(const std::function<void(PageRun)>& visit) const override;
  std::optional<Partial> partial() const override;

 private:
  Status check_serving() const;
  Status read_file(uint64_t offset_bytes, std::span<std::byte> out) const;

  ImageCore& core_;
  const uint32_t region_index_;
};

}  // namespace vmigrate::pager
