// The serving side of shm: frames of a neighbour that may send anything.

#include <sys/mman.h>
#include <unistd.h>

#include <array>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/parked_connection.hpp"
#include "transport/frames.hpp"
#include "transport/shm/frames.hpp"
#include "transport/shm/serve.hpp"

namespace vmigrate {
namespace {

using namespace transport;

constexpr uint64_t kRegionBytes = 8192;

struct Server {
  Server() : parked(&prepare, &deliver, this) {
    const int fd = ::memfd_create("region", MFD_CLOEXEC);
    VMG_CHECK(fd >= 0 && ::ftruncate(fd, 2 * kRegionBytes) == 0);
    for (const Access access : {Access::kRead, Access::kReadWrite}) {
      const LocalMemory memory{.fd = fd, .fd_offset_bytes = kRegionBytes, .length_bytes = kRegionBytes};
      keys.push_back(parked.session().expose(memory, access).value().key);
    }
  }
  static Status prepare(ExposedKey& key) {
    key.passed_fd.reset(::dup(key.memory.memory().fd));
    return ok();
  }
  static void deliver(void* context, Channel, std::span<const std::byte> message) {
    static_cast<Server*>(context)->messages.emplace_back(message.begin(), message.end());
  }
  std::vector<uint64_t> keys;
  std::vector<std::vector<std::byte>> messages;
  fuzz::ParkedConnection parked;
};

struct Expected {
  std::vector<std::vector<std::byte>> messages;
  std::vector<ShmMapReply> replies;
  size_t descriptor_count = 0;
};

/// Puts the real keys into the stream where it has their numbers, and says what it must do.
Expected walk(const Server& server, std::vector<std::byte>& stream) {
  Expected expected;
  for (size_t at = 0; stream.size() - at >= wire::kFrameHeaderBytes;) {
    ShmMap map;
    std::memcpy(&map, stream.data() + at, sizeof map);
    const wire::FrameHeader header = decode_header(stream.data() + at);
    const auto* bytes = reinterpret_cast<const uint8_t*>(stream.data() + at);
    if (map.op == static_cast<uint8_t>(ShmOp::kMap)) {
      const auto is_zero = [](uint8_t byte) { return byte == 0; };
      if (!std::all_of(bytes + 1, bytes + 16, is_zero) || !std::all_of(bytes + 24, bytes + 32, is_zero))
        break;
      if (map.key < server.keys.size()) map.key = server.keys[map.key];
      std::memcpy(stream.data() + at, &map, sizeof map);
      ShmMapReply reply{};
      reply.op = static_cast<uint8_t>(ShmOp::kMapReply);
      reply.key = map.key;
      const auto known = std::find(server.keys.begin(), server.keys.end(), map.key);
      reply.status =
          static_cast<uint8_t>(known == server.keys.end() ? wire::OpStatus::kBadKey : wire::OpStatus::kOk);
      if (known != server.keys.end()) {
        reply.access =
            static_cast<uint8_t>(known == server.keys.begin() ? Access::kRead : Access::kReadWrite);
        reply.length = reply.offset = kRegionBytes;
        ++expected.descriptor_count;
      }
      expected.replies.push_back(reply);
      at += sizeof map;
    } else if (map.op == static_cast<uint8_t>(wire::FrameOp::kMessage) && valid_message_header(header)) {
      at += sizeof header;
      if (stream.size() - at < header.length) break;
      const auto body = std::span(stream).subspan(at, header.length);
      expected.messages.emplace_back(body.begin(), body.end());
      at += header.length;
    } else {
      break;
    }
  }
  return expected;
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const std::array<uint16_t, 3> splits{10, 32, 70};
  for (uint64_t key = 0; key < 3; ++key) {
    const ShmMap map{
        .op = static_cast<uint8_t>(ShmOp::kMap), .reserved = {}, .key = key, .reserved_tail = {}};
    all.push_back(Seed().add(splits).add(map).add(map));
    all.push_back(Seed().add(splits).add(message_header(7)).fill(7, 'm').add(map));
  }
  all.push_back(Seed().add(splits).add(message_header(4096)).fill(4096, 'm'));
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static auto* const server = new Server;
  fuzz::Input input(bytes, length_bytes);
  std::array<size_t, 3> splits;
  for (size_t& split : splits) split = input.take<uint16_t>();
  std::sort(splits.begin(), splits.end());
  const auto rest = input.rest();
  std::vector<std::byte> stream(rest.begin(), rest.end());
  const Expected expected = walk(*server, stream);
  server->messages.clear();
  const auto replies = server->parked.serve(stream, splits, &serve_shm);
  VMG_CHECK(server->messages == expected.messages);
  VMG_CHECK(fuzz::same(replies.bytes, std::as_bytes(std::span(expected.replies))));
  VMG_CHECK(replies.descriptor_count == expected.descriptor_count);
  return 0;
}
