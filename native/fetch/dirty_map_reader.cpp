#include "fetch/dirty_map_reader.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "fetch/limits.hpp"
#include "fetch/probe.hpp"

namespace vmigrate::pager {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

class Reading {
 public:
  Reading(FetchCore& core, Link& link, milliseconds timeout)
      : core_(core), link_(link), deadline_(steady_clock::now() + timeout) {}

  Result<uint64_t> region(uint32_t region_index, uint32_t round) {
    const uint64_t page_count = core_.fill().region(region_index).page_count();
    const uint64_t map_bytes = (page_count + 7) / 8;
    if (link_.keys[region_index].dirty_map.length_bytes < wire::kDataMapHeaderBytes + map_bytes)
      return Error{ErrorCode::kProtocol, 0, "the source tells no written pages"};
    wire::DataMapHeader header{};
    uint64_t taken = 0, written = 0;
    for (uint64_t at = 0; at < map_bytes;) {
      const uint32_t head_bytes = at == 0 ? wire::kDataMapHeaderBytes : 0;
      const auto part_bytes =
          static_cast<uint32_t>(std::min<uint64_t>(kMapPartBytes - head_bytes, map_bytes - at));
      const uint64_t offset_bytes = wire::kDataMapHeaderBytes - head_bytes + at;
      if (auto read = this->read(region_index, offset_bytes, head_bytes + part_bytes); !read)
        return read.error();
      if (at == 0) {
        std::memcpy(&header, core_.map_buffer.data(), sizeof header);
        if (header.magic != wire::kDirtyMapMagic || header.page_count != page_count ||
            header.ready != round || header.data_page_count > page_count)
          return Error{ErrorCode::kProtocol, 0, "header of a map of written pages"};
      }
      const auto bits = std::span(core_.map_buffer).subspan(head_bytes, part_bytes);
      const auto part = take_back(region_index, at * 8, bits, written);
      if (!part) return part.error();
      taken += part.value();
      at += part_bytes;
    }
    if (written != header.data_page_count)
      return Error{ErrorCode::kProtocol, 0, "bits of a map of written pages do not add up"};
    return taken;
  }

 private:
  Status read(uint32_t region_index, uint64_t offset_bytes, uint32_t length_bytes) {
    const transport::Operation operation{
        .tag = ++tag_,
        .local = link_.map_buffer,
        .local_offset_bytes = 0,
        .remote = link_.keys[region_index].dirty_map,
        .remote_offset_bytes = offset_bytes,
        .length_bytes = length_bytes,
    };
    if (core_.owner().must_end()) return Error{ErrorCode::kClosed, 0, "the session must end"};
    const auto left = std::chrono::duration_cast<milliseconds>(deadline_ - steady_clock::now());
    const auto answered = read_and_wait(*link_.endpoint, operation, std::max(left, milliseconds(0)));
    if (!answered) return answered.error();
    if (answered.value() != transport::OpResult::kOk)
      return Error{ErrorCode::kProtocol, 0, "read a map of written pages"};
    return ok();
  }

  /// The bits begin with that of `first_page`.
  Result<uint64_t> take_back(uint32_t region_index, uint64_t first_page, std::span<const std::byte> bits,
                             uint64_t& written) {
    const uint64_t page_count = core_.fill().region(region_index).page_count();
    uint64_t taken = 0;
    const auto is_set = [&](uint64_t i) { return (static_cast<uint8_t>(bits[i / 8]) >> i % 8 & 1) != 0; };
    for (uint64_t i = 0; i < bits.size() * 8;) {
      if (i % 8 == 0 && bits[i / 8] == std::byte{0}) {
        i += 8;
        continue;
      }
      uint64_t end = i;
      while (end < bits.size() * 8 && is_set(end)) ++end;
      if (end == i) {
        ++i;
        continue;
      }
      if (first_page + end > page_count)
        return Error{ErrorCode::kProtocol, 0, "a written page behind the end of a region"};
      written += end - i;
      taken += core_.fill().take_back(region_index, {PageIndex{first_page + i}, end - i});
      i = end;
    }
    return taken;
  }

  FetchCore& core_;
  Link& link_;
  const steady_clock::time_point deadline_;
  /// Differs from the tags of other operations that this connection has had.
  uint64_t tag_ = uint64_t{1} << 62;
};

}  // namespace

Result<uint64_t> take_back_written(FetchCore& core, Link& link, uint32_t round, milliseconds timeout) {
  Reading reading(core, link, timeout);
  uint64_t taken = 0;
  for (uint32_t i = 0; i < core.fill().regions().size(); ++i) {
    const auto region = reading.region(i, round);
    if (!region) return region.error();
    taken += region.value();
  }
  return taken;
}

}  // namespace vmigrate::pager
