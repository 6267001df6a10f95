// The requester's side of tcp, against a source that may send anything. A model of the protocol says which
// operations complete, with what, and which messages arrive.

#include <sys/socket.h>

#include <memory>

#include "tests/fuzz/fuzz.hpp"
#include "transport/frames.hpp"
#include "transport/tcp/endpoint.hpp"

namespace vmigrate {
namespace {

using namespace transport;
using wire::FrameHeader;
using wire::FrameOp;

enum Mode : uint8_t { kTagged = 1, kMadeBodies = 2, kSpoiledTag = 4 };
constexpr size_t kOperationsMax = 6, kLocalBytes = 32 << 10, kStreamBytesMax = 64 << 10;

struct Wanted {
  uint8_t is_write;
  uint16_t offset, length;
} __attribute__((packed));
/// How an input begins. Frames follow, whose tag is the number of one of the operations.
struct Settings {
  uint8_t mode;
  uint8_t spoiled_frame;  ///< kSpoiledTag: the number of the frame
  uint16_t splits[2];     ///< where the stream arrives in parts
  uint8_t operation_count;
  Wanted wanted[kOperationsMax];
} __attribute__((packed));

const FrameKey kTargetKey{1}, kSourceKey{2};

Operation operation_of(const Settings& settings, size_t index) {
  const Wanted& wanted = settings.wanted[index];
  Operation operation{};
  operation.tag = 100 + index;
  operation.local_offset_bytes = wanted.offset % kLocalBytes;
  operation.length_bytes =
      std::min<uint32_t>(wanted.length, static_cast<uint32_t>(kLocalBytes - operation.local_offset_bytes));
  operation.remote = {0, 5, 1 << 20};
  operation.remote_offset_bytes = index;
  return operation;
}

/// As OperationTable makes them, for operations that are posted to a new endpoint.
uint64_t wire_tag_of(uint64_t index) {
  return (index + 1) << 8 | index;
}

std::vector<std::byte> pristine_memory() {
  std::vector<std::byte> bytes(kLocalBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
  return bytes;
}

class Model {
 public:
  Model(fuzz::Input& input, const Settings& settings, const std::vector<std::byte>& pristine)
      : expected(pristine), settings_(settings) {
    if (is_tagged()) tags_ = FrameTags::create(kSourceKey).value();
    operation_count = settings.operation_count % (kOperationsMax + 1);
    // What would make the stream too long is left out: it could be answers.
    while (!input.empty() && stream.size() < kStreamBytesMax) {
      if (take_frame(input)) continue;
      add(input.rest());
      break;
    }
  }

  size_t operation_count = 0;
  std::vector<std::byte> stream, expected;
  std::vector<std::vector<std::byte>> messages;
  std::vector<std::pair<uint64_t, OpResult>> completions;  ///< before the connection ends
  /// Where bytes of a reply may be that was cut off, or whose tag is wrong.
  size_t doubtful_from = 0, doubtful_to = 0;
  bool is_tagged() const { return (settings_.mode & kTagged) != 0; }

 private:
  void add(std::span<const std::byte> bytes) { stream.insert(stream.end(), bytes.begin(), bytes.end()); }

  /// False: the endpoint must end the connection there.
  bool take_frame(fuzz::Input& input) {
    const auto head = input.bytes(sizeof(FrameHeader));
    if (head.size() < sizeof(FrameHeader)) return add(head), false;
    FrameHeader header = decode_header(head.data());
    const bool is_message = header.op == static_cast<uint8_t>(FrameOp::kMessage);
    if (!is_message && header.tag < kOperationsMax) header.tag = wire_tag_of(header.tag);
    add(std::as_bytes(std::span(&header, 1)));
    if (is_message) {
      if (!valid_message_header(header)) return false;
      const auto body = body_of(input, header.length, 1);
      add(body);
      if (body.size() != header.length || !add_tag(header, body)) return false;
      messages.push_back(body);
      return true;
    }
    const size_t index = header.tag & 0xff;
    if (index >= operation_count || header.tag != wire_tag_of(index) || is_done_[index]) return false;
    const Operation operation = operation_of(settings_, index);
    const auto answer = static_cast<uint8_t>(settings_.wanted[index].is_write & 1 ? FrameOp::kWriteReply
                                                                                  : FrameOp::kReadReply);
    const bool is_read = answer == static_cast<uint8_t>(FrameOp::kReadReply);
    const bool is_data = is_read && header.status == 1;
    if (header.op != answer || header.reserved != 0 || header.key != 0 || header.offset != 0 ||
        header.status == 0 || header.status > (is_read ? 6 : 5) ||
        header.length != (is_data ? operation.length_bytes : 0) || (is_data && header.length == 0))
      return false;
    const auto body = body_of(input, header.length, header.tag);
    add(body);
    if (body.size() != header.length || !add_tag(header, body)) {
      doubtful_from = operation.local_offset_bytes;
      doubtful_to = doubtful_from + body.size();
      return false;
    }
    if (is_data) std::memcpy(expected.data() + operation.local_offset_bytes, body.data(), body.size());
    constexpr OpResult kResults[] = {{},
                                     OpResult::kOk,
                                     OpResult::kBadKey,
                                     OpResult::kOutOfRange,
                                     OpResult::kNotAllowed,
                                     OpResult::kIoError,
                                     OpResult::kAbsent};
    completions.emplace_back(operation.tag, kResults[header.status]);
    is_done_[index] = true;
    return true;
  }

  std::vector<std::byte> body_of(fuzz::Input& input, size_t length_bytes, uint64_t seed) const {
    if ((settings_.mode & kMadeBodies) == 0) {
      const auto part = input.bytes(length_bytes);
      return {part.begin(), part.end()};
    }
    std::vector<std::byte> made(length_bytes);
    for (size_t i = 0; i < made.size(); ++i) made[i] = static_cast<std::byte>(seed + i * 13);
    return made;
  }

  bool add_tag(const FrameHeader& header, std::span<const std::byte> body) {
    if (!is_tagged()) return true;
    std::array<std::byte, wire::kFrameTagBytes> tag;
    tags_->begin();
    tags_->add(std::as_bytes(std::span(&header, 1)));
    tags_->add(body);
    VMG_CHECK(tags_->finish(tag));
    const bool is_spoiled = (settings_.mode & kSpoiledTag) != 0 && frames_++ == settings_.spoiled_frame;
    if (is_spoiled) tag[header.tag % tag.size()] ^= std::byte{1};
    add(tag);
    return !is_spoiled;
  }

  const Settings settings_;
  std::unique_ptr<FrameTags> tags_;
  size_t frames_ = 0;
  std::array<bool, kOperationsMax> is_done_{};
};

/// The requests are what was posted: the other half of the codec.
void check_requests(int peer, const Settings& settings, const Model& model,
                    const std::vector<std::byte>& pristine) {
  static std::array<std::byte, 512 << 10> got;
  const ssize_t count = ::recv(peer, got.data(), got.size(), MSG_DONTWAIT);
  size_t at = 0;
  const auto take = [&](size_t length_bytes) {
    VMG_CHECK(count >= 0 && static_cast<size_t>(count) - at >= length_bytes);
    at += length_bytes;
    return std::span<const std::byte>(got.data() + at - length_bytes, length_bytes);
  };
  auto tags = model.is_tagged() ? FrameTags::create(kTargetKey).value() : nullptr;
  for (size_t i = 0; i < model.operation_count; ++i) {
    const Operation operation = operation_of(settings, i);
    const bool is_write = (settings.wanted[i].is_write & 1) != 0;
    const FrameHeader header = decode_header(take(sizeof header).data());
    VMG_CHECK(header.op == static_cast<uint8_t>(is_write ? FrameOp::kWrite : FrameOp::kRead));
    VMG_CHECK(header.tag == wire_tag_of(i) && header.key == operation.remote.key && header.status == 0 &&
              header.offset == i && header.length == operation.length_bytes && header.reserved == 0);
    const auto body = take(is_write ? header.length : 0);
    VMG_CHECK(fuzz::same(body, std::span(pristine).subspan(operation.local_offset_bytes, body.size())));
    if (!tags) continue;
    tags->begin();
    tags->add(std::as_bytes(std::span(&header, 1)));
    tags->add(body);
    VMG_CHECK(tags->matches(take(wire::kFrameTagBytes).first<wire::kFrameTagBytes>()));
  }
}

void run(const Settings& settings, const Model& model, const std::vector<std::byte>& pristine) {
  int ends[2];
  VMG_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  UniqueFd peer(ends[1]);
  const auto security = model.is_tagged() ? Security::kIntegrity : Security::kNone;
  std::vector<std::byte> memory = pristine;
  TcpEndpoint endpoint(SocketStream(UniqueFd(ends[0])),
                       ConnectionTags::create(security, kTargetKey, kSourceKey).value());
  VMG_CHECK(endpoint.open().ok());
  const LocalId local =
      endpoint.register_local({.base = memory.data(), .length_bytes = memory.size()}).value();
  for (size_t i = 0; i < model.operation_count; ++i) {
    Operation operation = operation_of(settings, i);
    operation.local = local;
    const std::span one(&operation, 1);
    const bool is_write = (settings.wanted[i].is_write & 1) != 0;
    VMG_CHECK((is_write ? endpoint.write(one) : endpoint.read(one)).posted == 1);
  }
  check_requests(peer.get(), settings, model, pristine);

  std::vector<std::pair<uint64_t, OpResult>> completions;
  std::vector<std::vector<std::byte>> messages;
  const auto drain = [&] {
    for (;;) {
      std::array<Completion, 4> batch;
      const size_t count = endpoint.poll(batch);
      for (size_t i = 0; i < count; ++i) completions.emplace_back(batch[i].tag, batch[i].result);
      std::array<std::byte, wire::kMessageBytesMax> message;
      const size_t length_bytes = endpoint.receive(message);
      if (length_bytes != 0) messages.emplace_back(message.begin(), message.begin() + length_bytes);
      if (count == 0 && length_bytes == 0) return;
    }
  };
  size_t sent_bytes = 0;
  for (const size_t split : {std::min(settings.splits[0], settings.splits[1]),
                             std::max(settings.splits[0], settings.splits[1]), uint16_t{0xffff}}) {
    const size_t end = split == 0xffff ? model.stream.size() : std::min<size_t>(split, model.stream.size());
    // It may have been closed already.
    (void)::send(peer.get(), model.stream.data() + sent_bytes, end - sent_bytes, MSG_NOSIGNAL);
    sent_bytes = end;
    drain();
  }
  peer.reset();
  drain();
  VMG_CHECK(endpoint.disconnected());
  VMG_CHECK(messages == model.messages);
  VMG_CHECK(completions.size() == model.operation_count);
  for (size_t i = 0; i < completions.size(); ++i) {
    if (i < model.completions.size())
      VMG_CHECK(completions[i] == model.completions[i]);
    else
      VMG_CHECK(completions[i].second == OpResult::kDisconnected);
  }
  std::vector<std::byte> expected = model.expected;
  std::copy(memory.begin() + static_cast<ptrdiff_t>(model.doubtful_from),
            memory.begin() + static_cast<ptrdiff_t>(model.doubtful_to),
            expected.begin() + static_cast<ptrdiff_t>(model.doubtful_from));
  VMG_CHECK(fuzz::same(memory, expected));
}

FrameHeader reply(FrameOp op, uint64_t index, uint32_t length, wire::OpStatus status = wire::OpStatus::kOk) {
  FrameHeader header{};
  header.op = static_cast<uint8_t>(op);
  header.status = static_cast<uint8_t>(status);
  header.length = length;
  header.tag = index;
  return header;
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (const uint8_t mode : {0, 1, 2, 3, 5, 7}) {
    Settings settings{mode, 1, {40, 4200}, 3, {{0, 4096, 4096}, {1, 0, 64}, {0, 8200, 16}}};
    const FrameHeader message = message_header(5);
    const size_t body_bytes = (mode & kMadeBodies) != 0 ? 0 : 16;
    const FrameHeader small = reply(FrameOp::kReadReply, 2, 16), write = reply(FrameOp::kWriteReply, 1, 0);
    all.push_back(Seed().add(settings).add(small).fill(body_bytes, 'd').add(write));
    all.push_back(Seed().add(settings).add(write).add(small).fill(body_bytes, 'd').add(message).fill(5, 'm'));
    all.push_back(Seed().add(settings).add(reply(FrameOp::kReadReply, 0, 4096)).fill(4 * body_bytes, 'd'));
    all.push_back(Seed().add(settings).add(write).add(write));
    all.push_back(Seed().add(settings).add(message).fill(5, 'm').add(message).fill(5, 'n').add(message));
    for (const auto status : {wire::OpStatus::kBadKey, wire::OpStatus::kAbsent, wire::OpStatus::kIoError}) {
      all.push_back(Seed().add(settings).add(reply(FrameOp::kReadReply, 0, 0, status)).add(write));
      all.push_back(Seed().add(settings).add(reply(FrameOp::kWriteReply, 1, 0, status)));
    }
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto pristine = pristine_memory();
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const Model model(input, settings, pristine);
  run(settings, model, pristine);
  return 0;
}
