// What a peer brings over RDMA: private data of the connection manager, frames, and the keys in them. The
// device itself is not here.

#include <chrono>
#include <memory>

#include "tests/fuzz/fuzz.hpp"
#include "transport/verbs/challenge_table.hpp"
#include "transport/verbs/keys.hpp"

namespace vmigrate {
namespace {

using namespace transport;

/// How an input begins: an operation on what was accepted. A frame follows.
struct Settings {
  uint8_t is_write;
  uint32_t length_bytes;
  uint64_t offset_bytes;
} __attribute__((packed));
constexpr uint64_t kKey = 77, kOtherKey = 78;

VerbsMapReply reply_of(uint64_t length, uint64_t chunk_bytes, uint32_t chunk_count) {
  VerbsMapReply reply{};
  reply.op = static_cast<uint8_t>(VerbsOp::kMapReply);
  reply.status = static_cast<uint8_t>(wire::OpStatus::kOk);
  reply.access = static_cast<uint8_t>(Access::kReadWrite);
  reply.chunk_count = chunk_count;
  reply.length = length;
  reply.key = kKey;
  reply.chunk_bytes = chunk_bytes;
  reply.address = 0x7f0000000000;
  return reply;
}

void take_reply(const Settings& settings, std::span<const std::byte> frame) {
  RemoteKeys keys;
  keys.find_or_add(kKey)->state = RemoteKeys::State::kAsked;
  keys.find_or_add(kOtherKey);  // not asked yet, so it cannot be answered
  OpResult result{};
  RemoteKeys::Entry* entry = keys.accept(frame, &result);
  if (entry == nullptr) {
    VMG_CHECK(keys.find_or_add(kKey)->state == RemoteKeys::State::kAsked);
    VMG_CHECK(keys.find_or_add(kOtherKey)->state == RemoteKeys::State::kUnasked);
    return;
  }
  VMG_CHECK(entry->key == kKey);
  VMG_CHECK(entry->state == (result == OpResult::kOk ? RemoteKeys::State::kOpen : RemoteKeys::State::kFree));
  if (result != OpResult::kOk) return;
  Operation operation{};
  operation.length_bytes = settings.length_bytes % (wire::kTransferBytesMax + 1);
  operation.remote_offset_bytes = settings.offset_bytes;
  const bool is_write = (settings.is_write & 1) != 0;
  const ChunkedKeys& chunks = entry->chunks;
  if (entry->check(operation, is_write) != OpResult::kOk) return;
  // What the datapath computes with it: the chunks of the first byte and of the last one, and addresses.
  VMG_CHECK(!is_write || entry->access == Access::kReadWrite);
  const uint64_t last = operation.remote_offset_bytes + operation.length_bytes - 1;
  VMG_CHECK(last >= operation.remote_offset_bytes && last < chunks.length_bytes);
  VMG_CHECK(last / chunks.chunk_bytes < chunks.keys.size());
  VMG_CHECK(last / chunks.chunk_bytes - operation.remote_offset_bytes / chunks.chunk_bytes <= 1);
  VMG_CHECK(chunks.address + last >= chunks.address);
}

void take_private_data(std::span<const std::byte> data) {
  const wire::Hello hello = hello_in(data);
  const wire::Hello none{};
  if (data.size() < sizeof hello)
    VMG_CHECK(std::memcmp(&hello, &none, sizeof hello) == 0 && check_hello(hello) != wire::HelloStatus::kOk);
  else
    VMG_CHECK(std::memcmp(&hello, data.data(), sizeof hello) == 0);
  if (const auto reply = reply_in(data)) {
    VMG_CHECK(reply->magic == wire::kHelloMagic);
    (void)check_reply(*reply, wire::HelloStatus::kOk);
  }

  // A challenge is good for its own hello, once, and not for ever.
  static const auto table = std::make_unique<ChallengeTable>();
  static auto now = ChallengeTable::Clock::now();
  now += std::chrono::seconds(10);
  const auto yes = [](const Transcript&) { return true; };
  VMG_CHECK(!table->take(hello, now, yes));
  table->add(hello, now);
  wire::Hello other = hello;
  other.session[0] ^= 1;
  VMG_CHECK(!table->take(other, now, yes));
  VMG_CHECK(!table->take(hello, now, [](const Transcript&) { return false; }));
  VMG_CHECK(!table->take(hello, now + std::chrono::milliseconds(wire::kHelloTimeoutMs), yes));
  VMG_CHECK(table->take(
      hello, now, [&](const Transcript& transcript) { return is_same_hello(transcript.hello, hello); }));
  VMG_CHECK(!table->take(hello, now, yes));
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const Settings settings{1, 4096, 1 << 20};
  for (const uint32_t count : {1, 2, 5}) {
    const auto reply = reply_of(count * uint64_t{2} << 20, 2 << 20, count);
    all.push_back(Seed().add(settings).add(reply).fill(count * sizeof(uint32_t), 3));
    all.push_back(Seed().add(settings).add(reply).fill(count * sizeof(uint32_t) - 1, 3));
  }
  for (uint8_t status = 0; status < 8; ++status) {
    VerbsMapReply refused{};
    refused.op = static_cast<uint8_t>(VerbsOp::kMapReply);
    refused.status = status;
    refused.key = kKey;
    all.push_back(Seed().add(settings).add(refused));
  }
  all.push_back(Seed().add(settings).add(message_header(9)).fill(9, 'm'));
  VerbsMap map{};
  map.op = static_cast<uint8_t>(VerbsOp::kMap);
  map.key = kKey;
  all.push_back(Seed().add(settings).add(map));
  Greeting greeting({}, Channel::kBulk, Security::kNone);
  all.push_back(Seed().add(settings).add(greeting.hello()).fill(36, 0));
  all.push_back(Seed().add(settings).add(challenge({1, 2, 3})).fill(124, 0));
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const auto rest = input.rest();
  const std::vector<std::byte> frame(rest.begin(), rest.end());
  switch (kind_of(frame)) {
    case VerbsFrame::kMapReply:
      take_reply(settings, frame);
      break;
    case VerbsFrame::kMessage:
      VMG_CHECK(!message_in(frame).empty() && message_in(frame).size() <= wire::kMessageBytesMax);
      VMG_CHECK(message_in(frame).size() + wire::kFrameHeaderBytes == frame.size());
      break;
    case VerbsFrame::kMap:
      VMG_CHECK(frame.size() == sizeof(VerbsMap));
      break;
    case VerbsFrame::kWrong:
      break;
  }
  take_private_data(frame);
  return 0;
}
