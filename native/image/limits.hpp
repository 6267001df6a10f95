#pragma once

#include <cstddef>
#include <cstdint>

namespace vmigrate::pager {

/// Copied for one fault, and let through for one noted write: the neighbours are likely next, and
/// copying them takes about as long as a fault takes anyway.
inline constexpr uint64_t kImageClusterBytes = 64 << 10;
/// Copied at once by the sweep: bounds how long a fault waits for a page that the sweep has claimed.
inline constexpr uint64_t kImageChunkBytes = 256 << 10;
/// Of the parent's memory, protected or let go by one call: bounds how long its own faults wait for the
/// kernel's lock on its address space.
inline constexpr uint64_t kImagePieceBytes = 16 << 20;
/// Arming ends when no more than this had to be protected again, or after so many rounds.
inline constexpr uint64_t kImageArmedBytes = 16 << 20;
inline constexpr int kImageArmRoundsMax = 8;
/// Noted stretches with no more than this between them are protected by one call.
inline constexpr uint64_t kImageGapBytes = 4 * kImageClusterBytes;
/// Faults read at once, so that none of the parent and its clones keeps the others waiting for long.
inline constexpr size_t kImageFaultBatchMax = 16;
/// Faults on pages that the sweep has claimed. Beyond, faults stay in the kernel.
inline constexpr size_t kImageWaitsMax = 256;
/// A clone is a QEMU process; the daemon has descriptors of each.
inline constexpr size_t kImageClonesMax = 4096;

static_assert(kImageWaitsMax >= kImageFaultBatchMax);
static_assert(kImageChunkBytes % kImageClusterBytes == 0 && kImagePieceBytes % kImageClusterBytes == 0);

}  // namespace vmigrate::pager
