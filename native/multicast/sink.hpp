#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/types.hpp"

namespace vmigrate::multicast {

/// Where the pages of a multicast go. The receiver's thread makes all calls.
class PageSink {
 public:
  virtual ~PageSink() = default;
  /// How many pages a region has; 0: there is no such region.
  virtual uint64_t page_count(uint32_t region_index) const = 0;
  /// False: the page is here already, or comes by another way. A hint that saves assembling it.
  virtual bool wants(uint32_t region_index, PageIndex page) const = 0;
  /// All bytes of a page are here; they are valid during the call.
  virtual void take(uint32_t region_index, PageIndex page, std::span<const std::byte> bytes) = 0;
  /// No more datagrams are at hand, so it may take a while until the next call. A sink that keeps pages to
  /// store several at once stores them now.
  virtual void flush() {}
  /// Writes the pages that were asked for lately, as MulticastReport has them, and returns how many.
  virtual size_t wanted(std::span<uint64_t> out) = 0;
  /// Nothing more is wanted, whatever the reason.
  virtual bool must_end() const = 0;
};

}  // namespace vmigrate::multicast
