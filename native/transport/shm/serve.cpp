#include "transport/shm/serve.hpp"

#include <algorithm>
#include <cstring>

#include "transport/frames.hpp"
#include "transport/shm/frames.hpp"

namespace vmigrate::transport {
namespace {

bool receive_all(ServedConnection& connection, std::span<std::byte> out) {
  while (!out.empty()) {
    const size_t count = connection.receive(out);
    if (count == 0) return false;
    out = out.subspan(count);
  }
  return true;
}

bool serve_map(ServedConnection& connection, const ServedSession& session, const ShmMap& request) {
  const auto zero = [](uint8_t byte) { return byte == 0; };
  if (!std::all_of(std::begin(request.reserved), std::end(request.reserved), zero) ||
      !std::all_of(std::begin(request.reserved_tail), std::end(request.reserved_tail), zero))
    return false;
  ShmMapReply reply{};
  reply.op = static_cast<uint8_t>(ShmOp::kMapReply);
  reply.key = request.key;
  int passed_fd = -1;
  if (const ExposedKey* key = session.find(request.key)) {
    reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
    reply.access = static_cast<uint8_t>(key->access);
    reply.length = key->memory.length_bytes();
    reply.offset = key->memory.memory().fd_offset_bytes;
    passed_fd = key->passed_fd.get();
  } else {
    reply.status = static_cast<uint8_t>(wire::OpStatus::kBadKey);
  }
  iovec part{&reply, sizeof reply};
  return connection.send(std::span(&part, 1), false, passed_fd);
}

}  // namespace

void serve_shm(ServedConnection& connection, ServedSession& session) {
  std::array<std::byte, wire::kFrameHeaderBytes> frame;
  std::array<std::byte, wire::kMessageBytesMax> message;
  while (receive_all(connection, frame)) {
    const wire::FrameHeader header = decode_header(frame.data());
    if (header.op == static_cast<uint8_t>(ShmOp::kMap)) {
      ShmMap request;
      std::memcpy(&request, frame.data(), sizeof request);
      if (!serve_map(connection, session, request)) return;
    } else if (header.op == static_cast<uint8_t>(wire::FrameOp::kMessage) && valid_message_header(header)) {
      const std::span<std::byte> body(message.data(), header.length);
      if (!receive_all(connection, body)) return;
      session.deliver(connection.channel(), body);
    } else {
      return;
    }
  }
}

}  // namespace vmigrate::transport
