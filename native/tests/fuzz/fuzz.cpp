#include "tests/fuzz/fuzz.hpp"

#include <sys/socket.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

ssize_t vmigrate::fuzz::receive(int socket, std::span<std::byte> out, int flags) {
  size_t done_bytes = 0;
  for (;;) {
    const ssize_t count = ::recv(socket, out.data() + done_bytes, out.size() - done_bytes, flags);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return count;
    done_bytes += static_cast<size_t>(count);
    if (count == 0 || done_bytes >= out.size() || (flags & MSG_WAITALL) == 0)
      return static_cast<ssize_t>(done_bytes);
  }
}

ssize_t vmigrate::fuzz::send_with(int socket, std::span<const std::byte> bytes,
                                  std::span<const int> descriptors) {
  VMG_CHECK(descriptors.size() <= kDescriptorsMax);
  alignas(cmsghdr) char control[CMSG_SPACE(kDescriptorsMax * sizeof(int))] = {};
  iovec body{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &body;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(head), descriptors.data(), descriptors.size_bytes());
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL);
}

/// A small quarantine, because in a long run what was freed would fill the memory. large_blocks.cpp mixes the
/// ways to allocate.
extern "C" const char* __asan_default_options() {
  return "quarantine_size_mb=16:alloc_dealloc_mismatch=0";
}

/// With VMIGRATE_FUZZ_SEEDS the program writes its seeds into that folder, and does nothing else.
extern "C" int LLVMFuzzerInitialize(int* /*argument_count*/, char*** /*arguments*/) {
  const char* folder = std::getenv("VMIGRATE_FUZZ_SEEDS");
  if (folder == nullptr) return 0;
  int number = 0;
  for (const vmigrate::fuzz::Seed& seed : vmigrate::fuzz::seeds()) {
    const std::string path = std::string(folder) + "/seed-" + std::to_string(number++);
    std::FILE* file = std::fopen(path.c_str(), "wb");
    VMG_CHECK(file != nullptr);
    VMG_CHECK(std::fwrite(seed.bytes().data(), 1, seed.bytes().size(), file) == seed.bytes().size());
    VMG_CHECK(std::fclose(file) == 0);
  }
  std::exit(0);
}
