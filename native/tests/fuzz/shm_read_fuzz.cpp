// The requester's side of shm, against a neighbour that may send any frames, with any descriptors.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <memory>

#include "tests/fuzz/fuzz.hpp"
#include "transport/frames.hpp"
#include "transport/shm/endpoint.hpp"

namespace vmigrate {
namespace {

using namespace transport;

constexpr size_t kLocalBytes = 16 << 10, kFileBytes = 16 << 10, kPartsMax = 4, kKeys = 2;

/// What is sent in one piece: so many bytes of the stream, with so many descriptors.
struct Part {
  uint16_t length;
  uint8_t descriptors;  ///< two bits each: none, the region's file, a short one, a pipe
} __attribute__((packed));
/// How an input begins; the stream follows.
struct Settings {
  uint32_t remote_offset;  ///< of the operations
  uint16_t length;
  uint8_t is_write;
  Part parts[kPartsMax];
} __attribute__((packed));

struct Files {
  Files() {
    region = file_of(kFileBytes);
    shorter = file_of(4096);
    int ends[2];
    VMG_CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    pipe = ends[0];
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<std::byte>(i * 3 + i / 256);
    restore();
  }
  void restore() const {
    VMG_CHECK(::pwrite(region, content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()));
  }
  static int file_of(size_t length_bytes) {
    const int fd = ::memfd_create("region", MFD_CLOEXEC);
    VMG_CHECK(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(length_bytes)) == 0);
    return fd;
  }
  int region = -1, shorter = -1, pipe = -1;
  std::array<std::byte, kFileBytes> content;
};

void send_part(int socket, std::span<const std::byte> bytes, uint8_t descriptors, const Files& files) {
  std::array<int, fuzz::kDescriptorsMax> fds;
  size_t count = 0;
  for (; descriptors != 0; descriptors >>= 2) {
    if ((descriptors & 3) != 0)
      fds[count++] = std::array{-1, files.region, files.shorter, files.pipe}[descriptors & 3];
  }
  if (!bytes.empty()) (void)fuzz::send_with(socket, bytes, std::span(fds).first(count));
}

ShmMapReply map_reply(uint64_t key, uint64_t offset, uint64_t length, wire::OpStatus status) {
  ShmMapReply reply{};
  reply.op = static_cast<uint8_t>(ShmOp::kMapReply);
  reply.status = static_cast<uint8_t>(status);
  reply.access = static_cast<uint8_t>(Access::kReadWrite);
  reply.key = key;
  reply.offset = offset;
  reply.length = length;
  return reply;
}

void run(const Settings& settings, std::span<const std::byte> stream, const Files& files) {
  int ends[2];
  VMG_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  UniqueFd peer(ends[1]);
  std::vector<std::byte> memory(kLocalBytes, std::byte{0xa5});
  const auto endpoint = std::make_unique<ShmEndpoint>(SocketStream(UniqueFd(ends[0])), ConnectionTags{});
  VMG_CHECK(endpoint->open().ok());
  const LocalId local =
      endpoint->register_local({.base = memory.data(), .length_bytes = memory.size()}).value();
  const bool is_write = (settings.is_write & 1) != 0;
  const uint32_t length_bytes = 1 + settings.length % (kLocalBytes / 2);
  // One on each key, into a half of the memory.
  for (uint64_t key = 0; key < kKeys; ++key) {
    Operation operation{
        key, local, key * kLocalBytes / 2, {0, key, kFileBytes}, settings.remote_offset, length_bytes};
    const std::span one(&operation, 1);
    VMG_CHECK((is_write ? endpoint->write(one) : endpoint->read(one)).posted == 1);
  }
  std::vector<Completion> completions;
  size_t message_bytes = 0;
  const auto drain = [&] {
    for (;;) {
      std::array<Completion, 4> batch;
      const size_t count = endpoint->poll(batch);
      completions.insert(completions.end(), batch.begin(), batch.begin() + count);
      std::array<std::byte, wire::kMessageBytesMax> message;
      const size_t received_bytes = endpoint->receive(message);
      message_bytes += received_bytes;
      if (count == 0 && received_bytes == 0) return;
    }
  };
  for (const Part& part : settings.parts) {
    const auto bytes = stream.first(std::min<size_t>(part.length, stream.size()));
    stream = stream.subspan(bytes.size());
    send_part(peer.get(), bytes, part.descriptors, files);
    drain();
  }
  send_part(peer.get(), stream, 0, files);
  peer.reset();
  // A poll that has completions to give may leave the socket alone.
  for (int i = 0; i < 64 && !endpoint->disconnected(); ++i) drain();
  VMG_CHECK(endpoint->disconnected());

  VMG_CHECK(completions.size() == kKeys && completions[0].tag != completions[1].tag);
  bool is_file_touched = false;
  for (const Completion& completion : completions) {
    const auto half = std::span(memory).subspan(completion.tag * kLocalBytes / 2, kLocalBytes / 2);
    const auto is_untouched = [](std::byte byte) { return byte == std::byte{0xa5}; };
    const bool is_read = completion.result == OpResult::kOk && !is_write;
    is_file_touched |= completion.result == OpResult::kOk && is_write;
    VMG_CHECK(std::all_of(half.begin() + (is_read ? length_bytes : 0), half.end(), is_untouched));
    if (!is_read) continue;
    // The bytes are of the file, from some place on that the neighbour has named.
    const auto place = std::search(files.content.begin(), files.content.end(), half.begin(),
                                   half.begin() + std::min<uint32_t>(length_bytes, 512));
    VMG_CHECK(place != files.content.end());
  }
  std::array<std::byte, kFileBytes> now;
  VMG_CHECK(::pread(files.region, now.data(), now.size(), 0) == static_cast<ssize_t>(now.size()));
  if (!is_file_touched)
    VMG_CHECK(fuzz::same(now, files.content));
  else
    files.restore();
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (const uint8_t is_write : {0, 1}) {
    for (const uint8_t descriptors : {0, 1, 2, 3, 5, 9, 0x55}) {
      const Settings settings{100, 5000, is_write, {{40, descriptors}, {24, 1}, {90, 0}, {100, 0}}};
      all.push_back(Seed()
                        .add(settings)
                        .add(map_reply(0, 4096, 12288, wire::OpStatus::kOk))
                        .add(map_reply(1, 0, 16384, wire::OpStatus::kOk)));
      all.push_back(Seed()
                        .add(settings)
                        .add(message_header(6))
                        .fill(6, 'm')
                        .add(map_reply(1, 8, 8192, wire::OpStatus::kOk)));
      all.push_back(Seed().add(settings).add(map_reply(0, 0, 0, wire::OpStatus::kBadKey)));
      all.push_back(Seed().add(settings).add(map_reply(0, UINT64_MAX - 5, 10, wire::OpStatus::kOk)));
      all.push_back(Seed().add(settings).add(map_reply(2, 0, 16384, wire::OpStatus::kOk)));
    }
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const Files files;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  run(settings, input.rest(), files);
  return 0;
}
