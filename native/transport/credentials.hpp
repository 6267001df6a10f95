#pragma once

#include <cstdint>
#include <span>

namespace vmigrate::transport {

/// Takes the same time for every pair of inputs of one length, so that the time does not show how many bytes
/// of a guessed token were right. Lengths are public.
bool equal_constant_time(std::span<const uint8_t> left, std::span<const uint8_t> right);

/// Never 0. Comes from the kernel's generator, so that a key reveals nothing about another key.
uint64_t random_key();

}  // namespace vmigrate::transport
