#pragma once

#include <cstdint>
#include <span>

namespace vmigrate::transport {

/// Takes the same time for every pair of inputs of one length: how many bytes of a guessed token were right
/// must not show. Lengths are public.
bool equal_constant_time(std::span<const uint8_t> left, std::span<const uint8_t> right);

/// Never 0. From the kernel's generator, so that a key tells nothing of another.
uint64_t random_key();

}  // namespace vmigrate::transport
