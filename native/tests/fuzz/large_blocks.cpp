// Connections have buffers of up to a megabyte. AddressSanitizer maps and unmaps each anew, which takes
// longer than all else that an input does. Here they are kept for the next input; meanwhile every use of them
// is an error.

#include <sanitizer/asan_interface.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <new>

namespace {

constexpr size_t kLargeBytes = 128 << 10;

struct Block {
  void* memory = nullptr;
  size_t length_bytes = 0;
  bool is_free = false;
};

std::mutex mutex;  // guards blocks
std::array<Block, 64> blocks;

void* take_large(size_t length_bytes) {
  const std::lock_guard lock(mutex);
  Block* empty = nullptr;
  for (Block& block : blocks) {
    if (block.memory == nullptr && empty == nullptr) empty = &block;
    if (!block.is_free || block.length_bytes != length_bytes) continue;
    block.is_free = false;
    __asan_unpoison_memory_region(block.memory, length_bytes);
    return block.memory;
  }
  void* memory = std::malloc(length_bytes);
  if (empty != nullptr) *empty = {memory, length_bytes, false};
  return memory;
}

bool give_back(void* memory) {
  if (memory == nullptr) return false;
  const std::lock_guard lock(mutex);
  for (Block& block : blocks) {
    if (block.memory != memory) continue;
    if (block.is_free) std::abort();
    block.is_free = true;
    __asan_poison_memory_region(memory, block.length_bytes);
    return true;
  }
  return false;
}

}  // namespace

void* operator new(size_t length_bytes) {
  void* memory = length_bytes < kLargeBytes ? std::malloc(length_bytes) : take_large(length_bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* operator new[](size_t length_bytes) {
  return operator new(length_bytes);
}

void operator delete(void* memory) noexcept {
  if (!give_back(memory)) std::free(memory);
}

void operator delete(void* memory, size_t length_bytes) noexcept {
  if (length_bytes < kLargeBytes || !give_back(memory)) std::free(memory);
}

void operator delete[](void* memory) noexcept {
  operator delete(memory);
}

void operator delete[](void* memory, size_t /*length_bytes*/) noexcept {
  operator delete(memory);
}
