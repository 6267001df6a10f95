// The serving side of tcp: frames of a requester that may send anything. A model of the protocol, which knows
// the whole stream beforehand, says what must be answered, delivered and stored, with and without integrity.

#include <memory>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/parked_connection.hpp"
#include "transport/frames.hpp"
#include "transport/tcp/serve.hpp"

namespace vmigrate {
namespace {

using namespace transport;
using wire::FrameHeader;
using wire::FrameOp;

enum Mode : uint8_t { kTagged = 1, kMadeBodies = 2, kSpoiledTag = 4 };
/// How an input begins. Frames follow, whose key is the number of one of the regions below.
struct Settings {
  uint8_t mode;
  uint8_t spoiled_frame;  ///< kSpoiledTag: the number of the frame
  uint16_t splits[3];     ///< where the stream arrives in parts
} __attribute__((packed));

constexpr size_t kReadOnlyBytes = 8192, kWritableBytes = 12288, kLargeBytes = 68 << 10;
constexpr size_t kWritable = 1;
constexpr size_t kAnswersBytesMax = 512 << 10, kStreamBytesMax = 32 << 10;
const FrameKey kTargetKey{1}, kSourceKey{2};

/// Memory of the heap, so that AddressSanitizer sees its ends.
struct Memory {
  Memory(size_t length_bytes, Access access_, uint8_t first)
      : bytes(length_bytes), pristine(length_bytes), access(access_) {
    for (size_t i = 0; i < length_bytes; ++i) pristine[i] = static_cast<std::byte>(first + i * 7 + i / 256);
    bytes = pristine;
  }
  std::vector<std::byte> bytes, pristine;
  const Access access;
  uint64_t key = 0;
};

struct Server {
  Server() : parked([](ExposedKey&) { return ok(); }, &deliver, this) {
    for (Memory& memory : memories)
      memory.key =
          parked.session()
              .expose({.base = memory.bytes.data(), .length_bytes = memory.bytes.size()}, memory.access)
              .value()
              .key;
  }
  static void deliver(void* context, Channel channel, std::span<const std::byte> message) {
    VMG_CHECK(channel == Channel::kBulk);
    static_cast<Server*>(context)->messages.emplace_back(message.begin(), message.end());
  }
  Memory memories[3] = {{kReadOnlyBytes, Access::kRead, 1},
                        {kWritableBytes, Access::kReadWrite, 2},
                        {kLargeBytes, Access::kRead, 3}};
  std::vector<std::vector<std::byte>> messages;
  fuzz::ParkedConnection parked;
};

/// Makes the stream of an input, and says what it must do.
class Model {
 public:
  Model(Server& server, fuzz::Input& input, const Settings& settings)
      : expected(server.memories[kWritable].pristine), server_(server), settings_(settings) {
    if (is_tagged()) tags_ = FrameTags::create(kTargetKey).value();
    while (!input.empty() && !is_full()) {
      if (take_frame(input)) continue;
      add(input.rest());
      break;
    }
  }

  std::vector<std::byte> stream;
  std::vector<std::byte> expected;  ///< content of the region that can be written
  std::vector<std::vector<std::byte>> messages;
  std::vector<std::pair<FrameHeader, std::vector<std::byte>>> replies;
  /// Bytes of a WRITE that was cut off; without tags they may have been stored.
  size_t doubtful_from = 0, doubtful_to = 0;
  bool is_tagged() const { return (settings_.mode & kTagged) != 0; }

 private:
  void add(std::span<const std::byte> bytes) { stream.insert(stream.end(), bytes.begin(), bytes.end()); }

  /// The rest of the input is left out: the server would answer it.
  bool is_full() const { return answers_bytes_ >= kAnswersBytesMax || stream.size() >= kStreamBytesMax; }

  /// False: the server must end the connection there.
  bool take_frame(fuzz::Input& input) {
    const auto head = input.bytes(sizeof(FrameHeader));
    if (head.size() < sizeof(FrameHeader)) return add(head), false;
    FrameHeader header = decode_header(head.data());
    const auto op = static_cast<FrameOp>(header.op);
    if (op != FrameOp::kMessage && header.key < 3) header.key = server_.memories[header.key].key;
    const auto memory = std::find_if(std::begin(server_.memories), std::end(server_.memories),
                                     [&](const Memory& one) { return one.key == header.key; });
    const bool is_known = memory != std::end(server_.memories);
    const bool is_request = op == FrameOp::kRead || op == FrameOp::kWrite;
    const bool is_right =
        is_request ? header.status == 0 && header.reserved == 0 && header.length <= wire::kTransferBytesMax
                   : op == FrameOp::kMessage && valid_message_header(header);
    const size_t body_bytes = is_right && op != FrameOp::kRead ? header.length : 0;
    const std::vector<std::byte> body = body_of(input, body_bytes, header.tag);
    add(std::as_bytes(std::span(&header, 1)));
    add(body);
    if (!is_right) return false;
    const bool is_whole = body.size() == body_bytes;
    const bool has_tag = is_whole && add_tag(header, body);
    if (op == FrameOp::kMessage) {
      if (has_tag) messages.push_back(body);
      return has_tag;
    }
    const bool is_inside = is_known && header.length != 0 && header.length <= memory->bytes.size() &&
                           header.offset <= memory->bytes.size() - header.length;
    const bool may = is_known && (op == FrameOp::kRead || memory->access == Access::kReadWrite);
    const auto status = !is_known    ? wire::OpStatus::kBadKey
                        : !may       ? wire::OpStatus::kNotAllowed
                        : !is_inside ? wire::OpStatus::kOutOfRange
                                     : wire::OpStatus::kOk;
    if (!has_tag) {
      if (!is_tagged() && op == FrameOp::kWrite && status == wire::OpStatus::kOk)
        doubtful_from = header.offset, doubtful_to = header.offset + body.size();
      return false;
    }
    FrameHeader reply{};
    reply.op = static_cast<uint8_t>(op == FrameOp::kRead ? FrameOp::kReadReply : FrameOp::kWriteReply);
    reply.status = static_cast<uint8_t>(status);
    reply.tag = header.tag;
    std::vector<std::byte> data;
    if (status == wire::OpStatus::kOk) {
      const bool may_write = memory->access == Access::kReadWrite;
      const std::span<const std::byte> content = may_write ? expected : memory->pristine;
      const auto part = content.subspan(header.offset, header.length);
      if (op == FrameOp::kRead)
        data.assign(part.begin(), part.end());
      else
        std::memcpy(expected.data() + header.offset, body.data(), body.size());
    }
    reply.length = static_cast<uint32_t>(data.size());
    answers_bytes_ += data.size();
    replies.emplace_back(reply, std::move(data));
    return true;
  }

  std::vector<std::byte> body_of(fuzz::Input& input, size_t length_bytes, uint64_t seed) const {
    if ((settings_.mode & kMadeBodies) == 0 || stream.size() + length_bytes > kStreamBytesMax) {
      const auto part = input.bytes(length_bytes);
      return {part.begin(), part.end()};
    }
    std::vector<std::byte> made(length_bytes);
    for (size_t i = 0; i < made.size(); ++i) made[i] = static_cast<std::byte>(seed + i * 13);
    return made;
  }

  /// False: the tag is wrong.
  bool add_tag(const FrameHeader& header, std::span<const std::byte> body) {
    if (!is_tagged()) return true;
    std::array<std::byte, wire::kFrameTagBytes> tag;
    tags_->begin();
    tags_->add(std::as_bytes(std::span(&header, 1)));
    tags_->add(body);
    VMG_CHECK(tags_->finish(tag));
    const bool is_spoiled = (settings_.mode & kSpoiledTag) != 0 && frames_++ == settings_.spoiled_frame;
    if (is_spoiled) tag[header.offset % tag.size()] ^= std::byte{1};
    add(tag);
    return !is_spoiled;
  }

  Server& server_;
  const Settings settings_;
  std::unique_ptr<FrameTags> tags_;
  size_t frames_ = 0, answers_bytes_ = 0;
};

void check_replies(const Model& model, const std::vector<std::byte>& got) {
  auto tags = model.is_tagged() ? FrameTags::create(kSourceKey).value() : nullptr;
  size_t at = 0;
  for (const auto& [header, data] : model.replies) {
    const size_t frame_bytes = sizeof header + data.size();
    VMG_CHECK(got.size() - at >= frame_bytes + (tags ? wire::kFrameTagBytes : 0));
    VMG_CHECK(std::memcmp(got.data() + at, &header, sizeof header) == 0);
    VMG_CHECK(fuzz::same(data, {got.data() + at + sizeof header, data.size()}));
    if (tags) {
      tags->begin();
      tags->add({got.data() + at, frame_bytes});
      VMG_CHECK(tags->matches(std::span<const std::byte, wire::kFrameTagBytes>(got.data() + at + frame_bytes,
                                                                               wire::kFrameTagBytes)));
      at += wire::kFrameTagBytes;
    }
    at += frame_bytes;
  }
  VMG_CHECK(at == got.size());
}

FrameHeader request(FrameOp op, uint64_t key, uint64_t offset, uint32_t length, uint64_t tag) {
  FrameHeader header{};
  header.op = static_cast<uint8_t>(op);
  header.key = key;
  header.offset = offset;
  header.length = length;
  header.tag = tag;
  return header;
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (const uint8_t mode : {0, 1, 2, 3, 5, 7}) {
    const Settings settings{mode, 1, {40, 100, 5000}};
    const FrameHeader message = message_header(5);
    all.push_back(Seed().add(settings).add(request(FrameOp::kRead, 0, 4096, 4096, 7)));
    all.push_back(Seed()
                      .add(settings)
                      .add(request(FrameOp::kRead, 2, 0, 65536, 8))
                      .add(request(FrameOp::kRead, 1, 0, 12288, 9)));
    all.push_back(Seed().add(settings).add(message).fill(5, 'm').add(message).fill(5, 'n'));
    all.push_back(Seed()
                      .add(settings)
                      .add(request(FrameOp::kWrite, 1, 8, 16, 1))
                      .fill((mode & kMadeBodies) != 0 ? 0 : 16, 'w')
                      .add(request(FrameOp::kRead, 1, 0, 64, 2)));
    all.push_back(Seed()
                      .add(settings)
                      .add(request(FrameOp::kWrite, 1, 4096, 8192, 1))
                      .add(request(FrameOp::kWrite, 0, 0, 4096, 2))
                      .add(request(FrameOp::kRead, 3, 0, 4096, 2)));
    all.push_back(
        Seed().add(settings).add(request(FrameOp::kRead, 0, 8000, 4096, 1)).add(message).fill(3, 0));
    all.push_back(Seed().add(settings).add(request(FrameOp::kReadReply, 0, 0, 0, 0)));
    all.push_back(Seed().add(settings).add(request(FrameOp::kWrite, 1, 0, wire::kTransferBytesMax, 0)));
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static auto* const server = new Server;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const Model model(*server, input, settings);
  const auto security = model.is_tagged() ? Security::kIntegrity : Security::kNone;
  server->parked.connection().tags() = ConnectionTags::create(security, kSourceKey, kTargetKey).value();
  server->messages.clear();
  std::array<size_t, 3> splits{settings.splits[0], settings.splits[1], settings.splits[2]};
  std::sort(splits.begin(), splits.end());
  const auto replies = server->parked.serve(model.stream, splits, &serve_tcp);

  check_replies(model, replies.bytes);
  VMG_CHECK(server->messages == model.messages);
  for (Memory& memory : server->memories) {
    if (memory.access == Access::kRead) VMG_CHECK(fuzz::same(memory.bytes, memory.pristine));
  }
  auto& [written, pristine, access, key] = server->memories[kWritable];
  const auto doubtful = std::span(written).first(model.doubtful_to).subspan(model.doubtful_from);
  std::vector<std::byte> expected = model.expected;
  std::copy(doubtful.begin(), doubtful.end(), expected.begin() + static_cast<ptrdiff_t>(model.doubtful_from));
  VMG_CHECK(fuzz::same(written, expected));
  std::memcpy(written.data(), pristine.data(), pristine.size());
  return 0;
}
