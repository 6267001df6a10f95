// A receiver's side of a multicast: datagrams of its sender, of other members, and of anybody else.

#include <memory>
#include <set>

#include "multicast/intake.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace vmigrate {
namespace {

using namespace multicast;

constexpr uint64_t kSession = 0x1122334455667788;
constexpr uint64_t kPageCounts[] = {5, 70};

enum Flags : uint8_t { kGenuine = 1, kSpoiled = 2, kEndRecord = 4, kShort = 8, kLong = 16 };
/// An input is a row of these.
struct Sent {
  uint8_t flags;
  DatagramHeader header;
} __attribute__((packed));

std::byte byte_at(uint32_t region, uint64_t offset_bytes) {
  return static_cast<std::byte>(region * 101 + offset_bytes * 7 + offset_bytes / 4096);
}

/// Checks that each page comes once, whole and right.
class Sink final : public PageSink {
 public:
  uint64_t page_count(uint32_t region) const override { return region < 2 ? kPageCounts[region] : 0; }
  bool wants(uint32_t region, PageIndex page) const override { return !taken.contains({region, raw(page)}); }
  void take(uint32_t region, PageIndex page, std::span<const std::byte> bytes) override {
    VMG_CHECK(raw(page) < page_count(region) && bytes.size() == kPageBytes);
    VMG_CHECK(taken.insert({region, raw(page)}).second);
    for (size_t i = 0; i < bytes.size(); ++i)
      VMG_CHECK(bytes[i] == byte_at(region, raw(page) * kPageBytes + i));
  }
  size_t wanted(std::span<uint64_t>) override { return 0; }
  bool must_end() const override { return false; }

  std::set<std::pair<uint32_t, uint64_t>> taken;
};

std::vector<std::byte> datagram_of(const Sent& sent, DatagramAuth& auth) {
  DatagramHeader header = sent.header;
  if ((sent.flags & kGenuine) != 0) {
    header.magic = wire::kDatagramMagic;
    header.session = kSession;
    header.member = kSenderMember;
  }
  const size_t wished_bytes = header.length % (kPageBytes + wire::kDatagramGrainBytes + 1);
  const size_t payload_bytes = (sent.flags & kEndRecord) != 0 ? sizeof(wire::MulticastEnd) : wished_bytes;
  header.length = static_cast<uint16_t>(payload_bytes);
  if ((sent.flags & kLong) != 0) ++header.length;
  std::vector<std::byte> datagram(sizeof header + payload_bytes);
  std::memcpy(datagram.data(), &header, sizeof header);
  for (size_t i = 0; i < payload_bytes; ++i)
    datagram[sizeof header + i] = byte_at(header.region, header.offset + i);
  if ((sent.flags & kGenuine) != 0) VMG_CHECK(auth.sign(datagram));
  if ((sent.flags & kSpoiled) != 0) datagram[sent.header.sequence % datagram.size()] ^= std::byte{1};
  if ((sent.flags & kShort) != 0) datagram.resize(sent.header.sequence % datagram.size());
  // A vector may have more memory than bytes.
  datagram.shrink_to_fit();
  return datagram;
}

Sent data(uint64_t sequence, uint32_t region, uint64_t offset, uint16_t length, uint8_t flags = kGenuine) {
  Sent sent{};
  sent.flags = flags;
  sent.header.kind = static_cast<uint8_t>(DatagramKind::kData);
  sent.header.region = static_cast<uint16_t>(region);
  sent.header.length = length;
  sent.header.sequence = sequence;
  sent.header.offset = offset;
  return sent;
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  all.push_back(Seed().add(data(1, 0, 0, 4096)).add(data(2, 1, 69 * 4096, 4096)));
  all.push_back(Seed().add(data(1, 0, 4096, 1408)).add(data(3, 0, 5504, 1344)).add(data(2, 0, 6848, 1344)));
  all.push_back(
      Seed().add(data(1, 1, 8192, 2048)).add(data(1, 1, 8192, 2048)).add(data(5000, 1, 10240, 2048)));
  all.push_back(Seed().add(data(1, 0, 5 * 4096, 4096)).add(data(2, 2, 0, 4096)).add(data(3, 0, 32, 64)));
  all.push_back(Seed().add(data(1, 0, 64, 4096)).add(data(2, 0, 0, 0)));
  for (const uint8_t flags : {0, 3, 9, 17}) all.push_back(Seed().add(data(1, 0, 0, 4096, flags)));
  Sent end = data(9, 0, 0, 16, kGenuine | kEndRecord);
  end.header.kind = static_cast<uint8_t>(DatagramKind::kEnd);
  all.push_back(Seed().add(data(1, 0, 0, 4096)).add(end));
  Sent report = end;
  report.header.kind = static_cast<uint8_t>(DatagramKind::kReport);
  all.push_back(Seed().add(report));
  Seed parts;  // of more pages than may be incomplete at a time
  for (uint64_t page = 0; page < 70; ++page) parts.add(data(page + 1, 1, page * 4096, 64));
  all.push_back(parts);
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto auth = DatagramAuth::create(Key{1, 2, 3}).value();
  fuzz::Input input(bytes, length_bytes);
  Sink sink;
  const auto intake = std::make_unique<Intake>(*auth, kSession, sink);
  std::set<uint64_t> seen;
  while (!input.empty()) {
    const auto sent = input.take<Sent>();
    const auto datagram = datagram_of(sent, *auth);
    const ReceiverCounters before = intake->counters();
    const size_t taken_before = sink.taken.size();
    const bool has_end_before = intake->has_end();
    const uint64_t highest = seen.empty() ? 0 : *seen.rbegin();
    const uint64_t sequence = sent.header.sequence;

    const auto kind = static_cast<DatagramKind>(sent.header.kind);
    const bool is_whole = (sent.flags & (kGenuine | kSpoiled | kShort | kLong)) == kGenuine;
    const bool is_accepted = intake->take(datagram);
    const ReceiverCounters after = intake->counters();
    VMG_CHECK(is_accepted == (is_whole && (kind == DatagramKind::kData || kind == DatagramKind::kEnd)));
    if (!is_accepted) {
      VMG_CHECK(after.rejected_datagrams == before.rejected_datagrams + 1);
      VMG_CHECK(after.received_datagrams == before.received_datagrams && sink.taken.size() == taken_before);
      VMG_CHECK(after.received_bytes == before.received_bytes && intake->has_end() == has_end_before);
      continue;
    }
    const bool is_new =
        sequence > highest || (highest - sequence < kReorderedMax && !seen.contains(sequence));
    VMG_CHECK(after.received_datagrams == before.received_datagrams + (is_new ? 1 : 0));
    VMG_CHECK(after.repeated_datagrams == before.repeated_datagrams + (is_new ? 0 : 1));
    if (!is_new) VMG_CHECK(sink.taken.size() == taken_before && intake->has_end() == has_end_before);
    if (is_new) seen.insert(sequence);
    VMG_CHECK(intake->highest_sequence() == std::max(highest, sequence));
  }
  return 0;
}
