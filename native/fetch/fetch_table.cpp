#include "fetch/fetch_table.hpp"

#include <algorithm>

#include "base/check.hpp"
#include "base/inject_point.hpp"

namespace vmigrate::pager {
namespace {

// Tag of an operation: slot in the low bits, the slot's generation above, top bit clear (the data map's is
// set).
constexpr unsigned kTagSlotBits = 16;

uint64_t tag_of(size_t slot, uint32_t generation) {
  return static_cast<uint64_t>(generation) << kTagSlotBits | slot;
}

Error error_of(const transport::Completion& completion) {
  using transport::OpResult;
  const int system_errno = completion.system_errno;
  switch (completion.result) {
    case OpResult::kNoSpace:
      return {ErrorCode::kNoSpace, system_errno, "region file system is full"};
    case OpResult::kIoError:
      // The source answers with this result when its file has shrunk.
      return {ErrorCode::kRegionChanged, system_errno, "source cannot read its region"};
    default:
      return {ErrorCode::kProtocol, system_errno, "source refused a read"};
  }
}

}  // namespace

void FetchTable::enqueue(size_t slot) {
  queue_[(queue_head_ + queue_count_) % kSlotsMax] = static_cast<uint16_t>(slot);
  ++queue_count_;
}

void FetchTable::dequeue(size_t slot) {
  size_t kept_count = 0;
  for (size_t i = 0; i < queue_count_; ++i) {
    const uint16_t other = queue_[(queue_head_ + i) % kSlotsMax];
    if (other != slot) queue_[(queue_head_ + kept_count++) % kSlotsMax] = other;
  }
  queue_count_ = kept_count;
}

void FetchTable::start(uint32_t region_index, PageRun run) {
  VMG_CHECK(used_count_ < capacity_ && run.count != 0);
  size_t slot = 0;
  while (slots_[slot].in_use) ++slot;
  Fetch& fetch = slots_[slot];
  fetch = Fetch{.region_index = region_index,
                .run = run,
                .length_bytes = run.count * fill_.regions()[region_index].page_bytes(),
                .generation = fetch.generation + 1,
                .in_use = true};
  ++used_count_;
  bytes_ += fetch.length_bytes;
  enqueue(slot);
}

bool FetchTable::post(Link& link) {
  while (queue_count_ != 0) {
    std::array<transport::Operation, kPostBatchMax> batch;
    std::array<uint16_t, kPostBatchMax> batch_slot;
    size_t count = 0;
    // The batch follows the order of the queue: the later parts of a fetch come before the next fetch.
    for (size_t i = 0; i < queue_count_ && count < batch.size(); ++i) {
      const uint16_t slot = queue_[(queue_head_ + i) % kSlotsMax];
      const Fetch& fetch = slots_[slot];
      const uint64_t run_offset_bytes =
          raw(fetch.run.first) * fill_.regions()[fetch.region_index].page_bytes();
      for (uint64_t at = fetch.posted_bytes; at < fetch.length_bytes && count < batch.size();) {
        const auto part_bytes =
            static_cast<uint32_t>(std::min<uint64_t>(fetch.length_bytes - at, wire::kTransferBytesMax));
        batch[count] = transport::Operation{
            .tag = tag_of(slot, fetch.generation),
            .local = link.local[fetch.region_index],
            .local_offset_bytes = run_offset_bytes + at,
            .remote = link.keys[fetch.region_index].ram,
            .remote_offset_bytes = run_offset_bytes + at,
            .length_bytes = part_bytes,
        };
        batch_slot[count++] = slot;
        at += part_bytes;
      }
      if (fetch.posted_bytes == 0) {
        inject_point(wire::InjectPoint::kTargetBeforePost, page_key(fetch.region_index, fetch.run.first));
      }
    }
    const transport::PostResult result = link.endpoint->read({batch.data(), count});
    VMG_CHECK(result.posted <= count);
    for (size_t i = 0; i < result.posted; ++i) {
      Fetch& fetch = slots_[batch_slot[i]];
      fetch.posted_bytes += batch[i].length_bytes;
      ++fetch.operations_in_flight;
      if (fetch.posted_bytes == fetch.length_bytes) {
        queue_head_ = (queue_head_ + 1) % kSlotsMax;
        --queue_count_;
      }
    }
    if (result.status == transport::PostStatus::kDisconnected) return false;
    if (result.posted < count) return true;
  }
  return true;
}

FetchTable::Completed FetchTable::complete(const transport::Completion& completion) {
  const size_t slot = completion.tag & ((uint64_t{1} << kTagSlotBits) - 1);
  // A stream transport returns the tag that the peer returned.
  if (slot >= kSlotsMax || !slots_[slot].in_use || completion.tag != tag_of(slot, slots_[slot].generation) ||
      slots_[slot].operations_in_flight == 0) {
    return {.progress = Progress::kFailed,
            .error = {ErrorCode::kProtocol, 0, "completion of an operation that is not outstanding"}};
  }
  Fetch& fetch = slots_[slot];
  if (completion.result == transport::OpResult::kDisconnected) return {.progress = Progress::kDisconnected};
  const bool is_absent = completion.result == transport::OpResult::kAbsent;
  if (completion.result != transport::OpResult::kOk && !is_absent) {
    return {.progress = Progress::kFailed, .error = error_of(completion)};
  }
  if (is_absent && !fetch.is_absent) {
    fetch.is_absent = true;
    if (fetch.posted_bytes != fetch.length_bytes) dequeue(slot);
    fetch.posted_bytes = fetch.length_bytes;
  }
  --fetch.operations_in_flight;
  if (fetch.operations_in_flight != 0 || fetch.posted_bytes != fetch.length_bytes) {
    return {.progress = Progress::kMore};
  }
  if (fetch.is_absent) return {.progress = Progress::kAbsent, .slot = slot, .error = error_of(completion)};
  bytes_counter_.fetch_add(fetch.length_bytes, std::memory_order_relaxed);
  return {.progress = Progress::kFinished, .slot = slot};
}

void FetchTable::release(size_t slot) {
  VMG_CHECK(slots_[slot].in_use);
  slots_[slot].in_use = false;
  --used_count_;
  bytes_ -= slots_[slot].length_bytes;
}

void FetchTable::rewind() {
  queue_head_ = queue_count_ = 0;
  for (size_t slot = 0; slot < kSlotsMax; ++slot) {
    if (!slots_[slot].in_use) continue;
    slots_[slot].is_absent = false;
    slots_[slot].posted_bytes = 0;
    slots_[slot].operations_in_flight = 0;
    ++slots_[slot].generation;
    enqueue(slot);
  }
}

}  // namespace vmigrate::pager
