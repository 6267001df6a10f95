#pragma once

#include <cstddef>
#include <cstdint>

#include "wire/wire_generated.hpp"

namespace vmigrate::pager {

/// Bytes that are copied for one fault, or made writable for one noted write. The neighbours are likely next,
/// and copying them takes about as long as a fault takes anyway.
inline constexpr uint64_t kImageClusterBytes = 64 << 10;
/// Bytes that the sweep copies at once. It bounds how long a fault waits for a page that the sweep has
/// claimed.
inline constexpr uint64_t kImageChunkBytes = 256 << 10;
/// Bytes of the parent's memory that one call protects or releases. It bounds how long the parent's own
/// faults wait for the kernel's lock on its address space.
inline constexpr uint64_t kImagePieceBytes = 16 << 20;
/// Arming ends when no more than this many bytes had to be protected again, or after this many rounds.
inline constexpr uint64_t kImageArmedBytes = 16 << 20;
inline constexpr int kImageArmRoundsMax = 8;
/// Noted stretches with a gap of at most this much between them are protected by one call.
inline constexpr uint64_t kImageGapBytes = 4 * kImageClusterBytes;
/// Faults that one read takes, so that no process keeps the others waiting for long.
inline constexpr size_t kImageFaultBatchMax = 16;
/// Faults on pages that the sweep has claimed. Further faults stay in the kernel.
inline constexpr size_t kImageWaitsMax = 256;
/// A clone is a QEMU process, and the daemon holds descriptors of each.
inline constexpr size_t kImageClonesMax = 4096;

// The neighbours of a fault that are mapped with it do not fault themselves.
static_assert(kImageClusterBytes == wire::kTouchClusterBytes);
static_assert(kImageWaitsMax >= kImageFaultBatchMax);
static_assert(kImageChunkBytes % kImageClusterBytes == 0 && kImagePieceBytes % kImageClusterBytes == 0);

}  // namespace vmigrate::pager
