#include "fetch/data_map_reader.hpp"

#include <algorithm>
#include <cstring>

namespace vmigrate::pager {

bool DataMapReader::step(Link& link, uint64_t at_ns) {
  if (finished() || in_flight_ || at_ns < due_ns_) return true;
  // The header is read again together with the first bits: only bits read after `ready` was seen are final.
  head_bytes_ = header_seen_ && at_bytes_ != 0 ? 0 : wire::kDataMapHeaderBytes;
  const uint64_t part_bytes =
      std::min<uint64_t>(core_.map_buffer.size() - head_bytes_, map_bytes() - at_bytes_);
  part_bytes_ = header_seen_ ? static_cast<uint32_t>(part_bytes) : 0;
  const transport::Operation operation{
      .tag = kTagFlag | generation_,
      .local = link.map_buffer,
      .local_offset_bytes = 0,
      .remote = link.keys[region_index_].data_map,
      .remote_offset_bytes = wire::kDataMapHeaderBytes - head_bytes_ + at_bytes_,
      .length_bytes = head_bytes_ + part_bytes_,
  };
  const transport::PostResult result = link.endpoint->read({&operation, 1});
  in_flight_ = result.posted == 1;
  return result.status != transport::PostStatus::kDisconnected;
}

bool DataMapReader::complete(const transport::Completion& completion) {
  if (completion.result == transport::OpResult::kDisconnected) return false;
  if (!in_flight_ || completion.tag != (kTagFlag | generation_) ||
      completion.result != transport::OpResult::kOk) {
    core_.owner().fail({ErrorCode::kProtocol, completion.system_errno, "read data map"});
    return true;
  }
  in_flight_ = false;
  ++generation_;
  if (head_bytes_ != 0 && !take_header()) return true;
  if (part_bytes_ != 0) {
    take_bits();
  } else {
    header_seen_ = true;
  }
  return true;
}

/// False: the bits that follow the header cannot be used, at least not yet.
bool DataMapReader::take_header() {
  wire::DataMapHeader header{};
  std::memcpy(&header, core_.map_buffer.data(), sizeof(header));
  const uint64_t page_count = core_.fill().region(region_index_).page_count();
  if (header.magic != wire::kDataMapMagic || header.page_count != page_count || header.ready > 1 ||
      header.data_page_count > page_count || header.ready < (header_seen_ ? 1u : 0u)) {
    core_.owner().fail({ErrorCode::kProtocol, 0, "data map header"});
    return false;
  }
  if (header.ready == 0) {
    due_ns_ = now_ns() + kMapRetryNs;
    return false;
  }
  data_pages_expected_ = header.data_page_count;
  data_pages_seen_ = 0;
  return true;
}

void DataMapReader::take_bits() {
  FilledRegion& region = core_.fill().region(region_index_);
  const uint64_t page_count = region.page_count();
  const uint64_t first_page = at_bytes_ * 8;
  const PageRun part{PageIndex{first_page}, std::min<uint64_t>(part_bytes_ * 8, page_count - first_page)};
  uint64_t zeroed = 0;
  for (uint32_t i = 0; i < part_bytes_; ++i) {
    const auto bits = static_cast<uint8_t>(core_.map_buffer[head_bytes_ + i]);
    const uint64_t first = (at_bytes_ + i) * 8;
    const uint64_t count = std::min<uint64_t>(8, page_count - first);
    for (uint64_t bit = 0; bit < count; ++bit) {
      if ((bits >> bit & 1) != 0) {
        ++data_pages_seen_;
      } else if (core_.owner().may_be_zero(region_index_, PageIndex{first + bit}) &&
                 region.presence->mark_zero(PageIndex{first + bit})) {
        // A fault that already waits for this page has claimed it; the page is then fetched, as zeros.
        ++zeroed;
      }
    }
  }
  if (zeroed != 0 && !core_.owner().zeros_are_right(region_index_, part)) return;
  at_bytes_ += part_bytes_;
  if (at_bytes_ == map_bytes()) {
    if (data_pages_seen_ != data_pages_expected_) {
      core_.owner().fail({ErrorCode::kProtocol, 0, "data map bits do not add up"});
      return;
    }
    core_.set_maps_known(++region_index_);
    header_seen_ = false;
    at_bytes_ = 0;
  }
  if (zeroed != 0) {
    core_.fill().add_zero(zeroed);
    core_.wake_demand();
  }
}

void DataMapReader::rewind() {
  in_flight_ = false;
  ++generation_;
  due_ns_ = 0;
  // The source may have been restarted and may scan again. Its bits are the same, because the VM has stopped
  // there.
  header_seen_ = false;
  at_bytes_ = 0;
}

}  // namespace vmigrate::pager
