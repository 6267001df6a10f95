// The sender's side of a multicast: reports of receivers, some of which lie, and datagrams of anybody.

#include <unistd.h>

#include "memory/region.hpp"
#include "multicast/datagram/writer.hpp"
#include "multicast/reports.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/one_file.hpp"

namespace vmigrate {
namespace {

using namespace multicast;

constexpr uint64_t kSession = 0x1122334455667788, kPageCount = 300, kNextSequence = 1000;
constexpr PacerOptions kPace{.limit_bytes_per_s = 1 << 30};

/// An input is a row of these.
struct Sent {
  uint8_t is_genuine;
  uint8_t length_change;  ///< of the datagram, when it is signed
  uint16_t member;
  uint32_t later_ns;
  uint64_t sequence;
  wire::MulticastReport report;
} __attribute__((packed));

/// Shows one datagram.
class Port final : public DatagramPort {
 public:
  size_t datagram_bytes_max() const override { return 1472; }
  size_t overhead_bytes() const override { return 28; }
  int event_fd() const override { return -1; }
  Status send(std::span<const std::byte>, size_t) override { return ok(); }
  Result<size_t> receive(DatagramVisitor& visitor) override {
    if (datagram.empty()) return 0;
    const auto shown = std::exchange(datagram, {});
    visitor.on_datagram(shown);
    return 1;
  }
  void adopt_source() override {}
  void answer(std::span<const std::byte>) override {}

  std::vector<std::byte> datagram;
};

std::vector<std::byte> datagram_of(const Sent& sent, DatagramAuth& auth) {
  const size_t bytes = sizeof(wire::MulticastReport) + (sent.length_change < 4 ? 0 : sent.length_change - 4);
  std::vector<std::byte> datagram(sizeof(DatagramHeader) + bytes);
  std::memcpy(datagram.data() + sizeof(DatagramHeader), &sent.report, sizeof sent.report);
  DatagramWriter writer(auth, kSession, sent.member, sent.sequence);
  VMG_CHECK(writer.finish(datagram, DatagramKind::kReport));
  if ((sent.is_genuine & 1) == 0) datagram[sent.sequence % datagram.size()] ^= std::byte{1};
  return datagram;
}

std::vector<std::unique_ptr<memory::Region>> one_region() {
  static const fuzz::OneFile file;
  const std::vector<std::byte> bytes(kPageCount * kPageBytes, std::byte{1});
  file.write(wire::PresenceHeader{}, 0, bytes);
  std::vector<std::unique_ptr<memory::Region>> regions;
  regions.push_back(
      memory::Region::open(file.path(), kPageCount * kPageBytes, kPageBytes, memory::Mode::kReadOnly)
          .value());
  return regions;
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  Sent sent{1, 0, 7, 20'000'000, 1, {}};
  sent.report = {5, 100, 90, 90 * 1448, 2, 0, {}};
  const uint64_t wanted[] = {17, uint64_t{1} << 48 | 3, 299};
  std::memcpy(sent.report.wanted, wanted, sizeof wanted);
  Seed many;
  for (int i = 0; i < 12; ++i) {
    all.push_back(Seed().add(sent));
    many.add(sent);
    ++sent.sequence;
    sent.report.clock_ns += 20'000'000;
    sent.report.highest_sequence += 50;
    sent.report.received_datagrams += 45;
    sent.report.received_bytes += 45 * 1448;
  }
  all.push_back(many);
  sent.report.wanted_count = 17;
  all.push_back(Seed().add(sent));
  sent.report.wanted_count = 16;
  all.push_back(Seed().add(sent));
  sent.report.received_datagrams = sent.report.highest_sequence + 1;
  all.push_back(Seed().add(sent));
  sent.member = 0;
  all.push_back(Seed().add(sent));
  sent.is_genuine = 0;
  all.push_back(Seed().add(sent));
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto auth = DatagramAuth::create(Key{1, 2, 3}).value();
  static const auto regions = one_region();
  static const auto fresh_plan = PagePlan::of(regions).value();
  fuzz::Input input(bytes, length_bytes);
  PagePlan plan = fresh_plan;
  Pacer pacer(kPace);
  ReportListener listener(*auth, kSession, pacer);
  Port port;
  uint64_t at_ns = 1, sent_bytes = 0;
  while (!input.empty()) {
    const auto sent = input.take<Sent>();
    at_ns += sent.later_ns;
    sent_bytes += sent.later_ns / 8;
    pacer.sent(sent_bytes, at_ns);
    port.datagram = datagram_of(sent, *auth);
    const auto& report = sent.report;
    const bool is_sane = (sent.is_genuine & 1) != 0 && sent.length_change <= 4 && sent.member != 0 &&
                         report.highest_sequence < kNextSequence &&
                         report.received_datagrams <= report.highest_sequence &&
                         report.wanted_count <= wire::kMulticastWantedMax;
    const uint64_t heard_before_ns = listener.heard_ns();
    VMG_CHECK(listener.listen(port, plan, kNextSequence, at_ns).ok());
    if (!is_sane) VMG_CHECK(listener.heard_ns() == heard_before_ns);
    const uint64_t rate = pacer.rate_bytes_per_s(at_ns);
    VMG_CHECK(rate >= kPace.floor_bytes_per_s && rate <= kPace.limit_bytes_per_s);
  }
  for (const MemberStatistics& member : listener.members()) {
    VMG_CHECK(member.member != 0 && member.sent_datagrams < kNextSequence);
    VMG_CHECK(member.lost_datagrams <= member.sent_datagrams);
  }
  // Whatever was wanted, each page is sent once.
  std::array<bool, kPageCount> is_sent{};
  while (const auto piece = plan.next(64)) {
    VMG_CHECK(piece->region_index == 0 && piece->run.count != 0 && piece->run.count <= 64);
    for (uint64_t page = raw(piece->run.first); page < raw(piece->run.first) + piece->run.count; ++page)
      VMG_CHECK(page < kPageCount && !std::exchange(is_sent[page], true));
  }
  VMG_CHECK(std::all_of(is_sent.begin(), is_sent.end(), [](bool was) { return was; }));
  return 0;
}
