#include "image/parent/guard.hpp"

#include <sched.h>

#include <algorithm>
#include <bit>

#include "base/inject_point.hpp"
#include "image/serve/clone_mapper.hpp"
#include "image/serve/limits.hpp"

namespace vmigrate::pager {

using uffd::Outcome;
using uffd::RangeOutcome;

namespace {

constexpr uint64_t kBitsPerWord = 64;

/// The kernel returns EAGAIN while the parent's address space is being copied or moved, which takes a short
/// time.
RangeOutcome write_protect(int uffd, HostAddr base, uint64_t length_bytes, bool protect) {
  for (;;) {
    const RangeOutcome result = uffd::write_protect_range(uffd, base, length_bytes, protect);
    if (result.outcome != Outcome::kAgain) return result;
    ::sched_yield();
  }
}

}  // namespace

ParentGuard::ParentGuard(ParentMemory& memory) : memory_(memory), core_(memory.core()), parent_(memory.vm()) {
  if (parent_ == nullptr) return;
  for (const MappedRange& range : parent_->ranges) {
    const uint64_t cluster_bytes = std::max(kImageClusterBytes, memory.page_bytes(range.region_index));
    const uint64_t clusters = (range.length_bytes + cluster_bytes - 1) / cluster_bytes;
    notes_.push_back(
        {cluster_bytes, std::vector<std::atomic<uint64_t>>((clusters + kBitsPerWord - 1) / kBitsPerWord)});
  }
}

int ParentGuard::uffd_of(const MappedRange& range) const {
  return parent_->descriptors[range.descriptor_index].fd.get();
}

Status ParentGuard::register_ranges() {
  if (is_gone()) return ok();
  for (const MappedRange& range : parent_->ranges) {
    const RangeOutcome result = uffd::register_range(uffd_of(range), range.base, range.length_bytes,
                                                     static_cast<uint64_t>(uffd::Mode::kWriteProtect));
    if (result.outcome == Outcome::kDone) continue;
    if (result.outcome == Outcome::kInvalid) {
      return Error{ErrorCode::kUnsupported, result.system_errno, "write-protection of shared memory"};
    }
    return uffd::call_error(result.system_errno, "UFFDIO_REGISTER");
  }
  return ok();
}

Status ParentGuard::protect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes) {
  const RangeOutcome result =
      write_protect(uffd_of(range), range.base + offset_bytes, length_bytes, /*protect=*/true);
  if (result.outcome == Outcome::kDone) return ok();
  return uffd::call_error(result.system_errno, "UFFDIO_WRITEPROTECT");
}

Status ParentGuard::protect_all() {
  if (is_gone()) return ok();
  for (const MappedRange& range : parent_->ranges) {
    for (uint64_t at = 0; at < range.length_bytes; at += kImagePieceBytes) {
      inject_point(wire::InjectPoint::kImageArm, at);
      if (core_.must_stop() != ImageCore::Stop::kNone) {
        return Error{ErrorCode::kClosed, 0, "the capture was closed"};
      }
      const uint64_t length_bytes = std::min(kImagePieceBytes, range.length_bytes - at);
      if (auto status = protect(range, at, length_bytes); !status) return status;
    }
  }
  return ok();
}

Status ParentGuard::protect_noted() {
  if (is_gone()) return ok();
  for (size_t i = 0; i < notes_.size(); ++i) {
    if (auto status = protect_noted_in(i); !status) return status;
  }
  return ok();
}

Status ParentGuard::protect_noted_in(size_t range_index) {
  const MappedRange& range = parent_->ranges[range_index];
  Notes& notes = notes_[range_index];
  const uint64_t gap = kImageGapBytes / kImageClusterBytes;
  // Noted stretches and the short gaps between them become one call; the gaps are already protected.
  uint64_t begin = 0, end = 0;
  const auto flush = [&]() -> Status {
    if (begin == end) return ok();
    const uint64_t from = begin * notes.cluster_bytes;
    const uint64_t length_bytes = std::min(end * notes.cluster_bytes, range.length_bytes) - from;
    memory_.counters.rearmed_pages.fetch_add(length_bytes / memory_.page_bytes(range.region_index),
                                             std::memory_order_relaxed);
    return protect(range, from, length_bytes);
  };
  for (size_t word = 0; word < notes.words.size(); ++word) {
    if (notes.words[word].load(std::memory_order_relaxed) == 0) continue;
    // A15 pairs with R15 in let_write: the protection was removed before the note that is cleared here was
    // set, so the protection set below comes after it.
    uint64_t bits = notes.words[word].exchange(0, std::memory_order_acquire);
    for (; bits != 0; bits &= bits - 1) {
      const uint64_t cluster = word * kBitsPerWord + static_cast<uint64_t>(std::countr_zero(bits));
      if (begin != end && cluster <= end + gap) {
        end = cluster + 1;
        continue;
      }
      if (auto status = flush(); !status) return status;
      begin = cluster;
      end = cluster + 1;
    }
  }
  return flush();
}

void ParentGuard::let_write(const MappedRange& range, HostAddr address) {
  Notes& notes = notes_[static_cast<size_t>(&range - parent_->ranges.data())];
  const uint64_t cluster = (raw(address) - raw(range.base)) / notes.cluster_bytes;
  const uint64_t from = cluster * notes.cluster_bytes;
  unprotect(range, from, std::min(notes.cluster_bytes, range.length_bytes - from));
  // R15 pairs with A15 in protect_noted_in. The write is allowed before it is noted. In the reverse order the
  // note could be cleared and the cluster protected in between; the cluster would then be writable without a
  // note.
  notes.words[cluster / kBitsPerWord].fetch_or(uint64_t{1} << cluster % kBitsPerWord,
                                               std::memory_order_release);
}

/// This call also wakes.
void ParentGuard::unprotect(const MappedRange& range, uint64_t offset_bytes, uint64_t length_bytes) {
  const RangeOutcome result =
      write_protect(uffd_of(range), range.base + offset_bytes, length_bytes, /*protect=*/false);
  if (result.outcome == Outcome::kDone) return;
  if (result.outcome == Outcome::kGone) {
    is_gone_.store(true, std::memory_order_relaxed);
  } else {
    core_.fail(uffd::call_error(result.system_errno, "UFFDIO_WRITEPROTECT"));
  }
}

void ParentGuard::release(uint32_t region_index, PageRun run) {
  if (is_gone()) return;
  const uint64_t page_bytes = memory_.page_bytes(region_index);
  const uint64_t begin = raw(run.first) * page_bytes;
  const uint64_t end = begin + run.count * page_bytes;
  for (const MappedRange& range : parent_->ranges) {
    if (range.region_index != region_index) continue;
    const uint64_t from = std::max(begin, range.region_offset_bytes);
    const uint64_t to = std::min(end, range.region_offset_bytes + range.length_bytes);
    if (from < to) unprotect(range, from - range.region_offset_bytes, to - from);
  }
}

void ParentGuard::wake_all() {
  if (is_gone()) return;
  for (const MappedRange& range : parent_->ranges) {
    if (uffd::wake_range(uffd_of(range), range.base, range.length_bytes).outcome == Outcome::kGone) {
      is_gone_.store(true, std::memory_order_relaxed);
    }
  }
}

void ParentGuard::let_go() {
  if (!is_gone()) static_cast<void>(release_vm(*parent_));
}

}  // namespace vmigrate::pager
