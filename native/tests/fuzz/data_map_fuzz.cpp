// Data maps as a source may send them: the map itself, which part of it comes when, and with which
// completion.

#include <sanitizer/asan_interface.h>

#include <bit>

#include "fetch/data_map_reader.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/support/filling.hpp"

namespace vmigrate {
namespace {

using pager::DataMapReader;
using transport::OpResult;
using wire::PageState;

constexpr uint64_t kPageBytes = 4096;
constexpr size_t kEventsMax = 64, kBufferBitsMax = 40, kHeadBytes = wire::kDataMapHeaderBytes;
const std::vector<uint64_t> kGeometries[] = {{1}, {9, 200}, {128, 7, 129}, {300, 8}};

/// How an input begins. Events follow.
struct Settings {
  uint8_t geometry;
  uint8_t buffer_bits;  ///< bytes of bits that are read at once, beside the header
  uint8_t pattern;      ///< which pages have data at the source
  uint8_t data;         ///< which pages are known to have data, whatever the source says
  uint8_t wrong_zeros;  ///< the how-manieth marks turn out to be wrong
} __attribute__((packed));
enum class What : uint8_t { kStep = 0, kComplete, kDemand, kRewind };
enum Flags : uint8_t {
  kEarly = 1,  // of a step
  kFull = 2,
  kCut = 4,
  kSpoiled = 1,  // of a completion
  kRaw = 2,      // the map's bytes follow
  kScans = 4,
  kOtherTag = 8,
  kOtherResult = 16,
  kGivesUp = 1,  // of demand
};
struct Event {
  uint8_t what;
  uint8_t flags;
  uint16_t place;
  uint8_t value;
} __attribute__((packed));

class Session final : public fuzz::Filling {
 public:
  explicit Session(std::span<const uint64_t> page_counts) : Filling(page_counts, kPageBytes) {}
  bool may_be_zero(uint32_t region_index, PageIndex page) const override {
    VMG_CHECK(raw(page) < page_count(region_index));
    return (data >> raw(page) % 8 & 1) == 0;
  }
  bool zeros_are_right(uint32_t region_index, PageRun run) override {
    looks.emplace_back(region_index, run);
    if (looks.size() != wrong_zeros) return true;
    fail({ErrorCode::kDamaged, 0, "zeros"});
    return false;
  }

  uint8_t data = 0, wrong_zeros = 0;
  std::vector<std::pair<uint32_t, PageRun>> looks;
};

class Model {
 public:
  Model(Session& session, const Settings& settings)
      : session_(session), settings_(settings), reader_(session.core()) {
    session.reset();
    session.data = settings.data;
    session.wrong_zeros = settings.wrong_zeros;
    session.looks.clear();
    auto& buffer = session.core().map_buffer;
    // Of this length exactly, so that AddressSanitizer sees what is behind it.
    buffer = std::vector<std::byte>(kHeadBytes + 1 + settings.buffer_bits % kBufferBitsMax);
    link_.endpoint = std::make_unique<fuzz::ScriptedEndpoint>(control_);
    link_.map_buffer =
        link_.endpoint->register_local({.base = buffer.data(), .length_bytes = buffer.size()}).value();
    for (uint32_t region = 0; region < session.region_count(); ++region) {
      link_.keys.push_back({{}, {0, 100 + region, kHeadBytes + map_bytes(region)}});
      states_.emplace_back(session.page_count(region));
    }
  }

  /// False: the session has failed, and the reader is not to ask for anything any more.
  bool may_ask() const { return !failure_; }
  bool is_finished() const { return region_ == states_.size(); }

  void step(uint8_t flags) {
    const uint64_t due_ns = reader_.due_ns();
    const bool is_early = (flags & kEarly) != 0 && is_paused_;
    const bool asks = !is_finished() && !outstanding_ && !is_early;
    control_.room = (flags & kFull) != 0 ? 0 : 1;
    control_.is_cut = (flags & kCut) != 0;
    const bool is_taken = asks && !control_.is_cut && control_.room != 0;
    VMG_CHECK(reader_.step(link_, is_early ? due_ns - 1 : due_ns) != (asks && control_.is_cut));
    VMG_CHECK(control_.posted.size() == (is_taken ? 1 : 0));
    if (!control_.posted.empty()) take_read(control_.posted.front());
    control_.posted.clear();
    if (asks && control_.is_cut) rewind();
    check();
  }

  void complete(const Event& event, fuzz::Input& input) {
    std::vector<std::byte>& buffer = session_.core().map_buffer;
    uint64_t tag = outstanding_ ? outstanding_->tag : tags_.empty() ? ~uint64_t{0} : tags_.back();
    if ((event.flags & kOtherTag) != 0) tag ^= uint64_t{1} << event.place % 63;
    const auto result =
        (event.flags & kOtherResult) != 0 ? static_cast<OpResult>(1 + event.value % 8) : OpResult::kOk;
    const auto served = serve(event, input);
    std::copy(served.begin(), served.end(), buffer.begin());
    ASAN_POISON_MEMORY_REGION(buffer.data() + served.size(), buffer.size() - served.size());
    const uint64_t before_ns = pager::now_ns();
    const bool is_connected = reader_.complete({tag, result, 0});
    ASAN_UNPOISON_MEMORY_REGION(buffer.data(), buffer.size());
    VMG_CHECK(is_connected == (result != OpResult::kDisconnected));
    if (!is_connected) {
      rewind();
    } else if (!outstanding_ || tag != outstanding_->tag || result != OpResult::kOk) {
      fail(ErrorCode::kProtocol);
    } else {
      const uint64_t at_bytes = outstanding_->remote_offset_bytes;
      outstanding_.reset();
      take(served, at_bytes == 0, before_ns);
    }
    check();
  }

  /// Demand claims a page, brings it, or gives it up.
  void demand(const Event& event) {
    const uint32_t region = event.value % session_.region_count();
    const PageRun page{PageIndex{event.place % session_.page_count(region)}, 1};
    std::byte& state = states_[region][raw(page.first)];
    memory::PresenceMap& presence = session_.presence(region);
    VMG_CHECK(presence.claim(page.first) == (state == std::byte{0}));
    if (state == std::byte{0}) {
      state = static_cast<std::byte>(PageState::kClaimed);
    } else if (state == static_cast<std::byte>(PageState::kClaimed)) {
      const bool gives_up = (event.flags & kGivesUp) != 0;
      gives_up ? presence.unclaim(page) : presence.publish(page);
      state = static_cast<std::byte>(gives_up ? PageState::kAbsent : PageState::kPresent);
    }
    check();
  }

  void rewind() {
    reader_.rewind();
    outstanding_.reset();
    is_ready_ = is_paused_ = false;
    at_bytes_ = 0;
    check();
  }

 private:
  uint64_t map_bytes(uint32_t region) const { return (session_.page_count(region) + 7) / 8; }

  /// What is read must be of the map of the first region that is not known, and go on where the last part has
  /// ended; bits only when the source has been ready before.
  void take_read(const transport::Operation& operation) {
    VMG_CHECK(DataMapReader::owns(operation.tag));
    VMG_CHECK(std::find(tags_.begin(), tags_.end(), operation.tag) == tags_.end());
    VMG_CHECK(operation.remote.key == link_.keys[region_].data_map.key && operation.local_offset_bytes == 0);
    const uint64_t head_bytes = at_bytes_ == 0 ? kHeadBytes : 0;
    VMG_CHECK(operation.remote_offset_bytes == kHeadBytes + at_bytes_ - head_bytes);
    VMG_CHECK(is_ready_ == (operation.length_bytes > head_bytes));
    tags_.push_back(operation.tag);
    outstanding_ = operation;
    is_paused_ = false;
  }

  /// The part of the map that was asked for, and nothing if nothing was.
  std::vector<std::byte> serve(const Event& event, fuzz::Input& input) const {
    if (!outstanding_) return {};
    if ((event.flags & kRaw) != 0) {
      const auto bytes = input.bytes(outstanding_->length_bytes);
      std::vector<std::byte> served(bytes.begin(), bytes.end());
      served.resize(outstanding_->length_bytes);
      return served;
    }
    std::vector<std::byte> map(kHeadBytes + map_bytes(region_));
    wire::DataMapHeader header{};
    header.magic = wire::kDataMapMagic;
    header.ready = (event.flags & kScans) != 0 ? 0 : 1;
    header.page_count = session_.page_count(region_);
    for (uint64_t i = 0; i < map_bytes(region_); ++i) {
      // Behind the last page there are bits, too.
      const auto bits = std::rotr(settings_.pattern, static_cast<int>(i % 8));
      map[kHeadBytes + i] = std::byte{bits};
      header.data_page_count += std::popcount(static_cast<uint8_t>(bits & mask_of(region_, i)));
    }
    std::memcpy(map.data(), &header, sizeof header);
    std::vector<std::byte> served(
        map.begin() + static_cast<std::ptrdiff_t>(outstanding_->remote_offset_bytes),
        map.begin() + static_cast<std::ptrdiff_t>(outstanding_->remote_offset_bytes) +
            outstanding_->length_bytes);
    if ((event.flags & kSpoiled) != 0) served[event.place % served.size()] ^= std::byte{event.value};
    return served;
  }
  uint8_t mask_of(uint32_t region, uint64_t byte) const {
    const uint64_t left = session_.page_count(region) - byte * 8;
    return left >= 8 ? 0xff : static_cast<uint8_t>((1 << left) - 1);
  }

  void take(std::span<const std::byte> served, bool has_head, uint64_t before_ns) {
    if (has_head) {
      wire::DataMapHeader header{};
      std::memcpy(&header, served.data(), sizeof header);
      served = served.subspan(kHeadBytes);
      const bool is_possible = header.magic == wire::kDataMapMagic &&
                               header.page_count == session_.page_count(region_) && header.ready <= 1 &&
                               header.data_page_count <= header.page_count;
      // What was final is never unfinished again on the same connection.
      if (!is_possible || (is_ready_ && header.ready == 0)) return fail(ErrorCode::kProtocol);
      if (header.ready == 0) {
        is_paused_ = true;
        VMG_CHECK(reader_.due_ns() >= before_ns + pager::kMapRetryNs);
        VMG_CHECK(reader_.due_ns() <= pager::now_ns() + pager::kMapRetryNs);
        return;
      }
      data_pages_left_ = static_cast<int64_t>(header.data_page_count);
    }
    if (served.empty())
      is_ready_ = true;
    else
      take_bits(served);
  }

  void take_bits(std::span<const std::byte> bits) {
    const uint64_t first = at_bytes_ * 8, page_count = session_.page_count(region_);
    const uint64_t end = std::min<uint64_t>(page_count, first + bits.size() * 8);
    uint64_t zeros = 0;
    for (uint64_t page = first; page < end; ++page) {
      std::byte& state = states_[region_][page];
      if ((static_cast<uint8_t>(bits[(page - first) / 8]) >> page % 8 & 1) != 0) {
        --data_pages_left_;
      } else if (state == std::byte{0} && (settings_.data >> page % 8 & 1) == 0) {
        state = static_cast<std::byte>(PageState::kZero);
        ++zeros;
      }
    }
    if (zeros != 0) {
      VMG_CHECK(session_.looks.size() == ++looks_);
      const auto& [region, run] = session_.looks.back();
      VMG_CHECK(region == region_ && raw(run.first) == first && run.count == end - first);
      if (looks_ == settings_.wrong_zeros) return fail(ErrorCode::kDamaged);
    }
    at_bytes_ += bits.size();
    if (at_bytes_ == map_bytes(region_)) {
      if (data_pages_left_ != 0) return fail(ErrorCode::kProtocol);
      ++region_;
      at_bytes_ = 0;
      is_ready_ = false;
    }
    zeros_ += zeros;
  }

  void fail(ErrorCode code) {
    if (!failure_) failure_ = code;
  }

  void check() {
    VMG_CHECK(session_.failure().has_value() == failure_.has_value());
    VMG_CHECK(!failure_ || session_.failure()->code == *failure_);
    VMG_CHECK(reader_.finished() == is_finished() && session_.core().maps_known() == region_);
    VMG_CHECK((reader_.due_ns() == UINT64_MAX) == (is_finished() || outstanding_.has_value()));
    VMG_CHECK(session_.fill().pages_zero() == zeros_ && session_.looks.size() == looks_);
    for (uint32_t region = 0; region < states_.size(); ++region) {
      VMG_CHECK(reader_.known(region) == (region < region_));
      VMG_CHECK(fuzz::same(session_.states(region), states_[region]));
    }
  }

  Session& session_;
  const Settings settings_;
  DataMapReader reader_;
  fuzz::ScriptedEndpoint::Control control_;
  pager::Link link_;

  std::vector<std::vector<std::byte>> states_;
  uint32_t region_ = 0;
  uint64_t at_bytes_ = 0;  ///< of the bits
  bool is_ready_ = false, is_paused_ = false;
  int64_t data_pages_left_ = 0;
  std::optional<transport::Operation> outstanding_;
  std::vector<uint64_t> tags_;
  std::optional<ErrorCode> failure_;
  uint64_t zeros_ = 0;
  size_t looks_ = 0;
};

Event event_of(What what, uint8_t flags = 0, uint16_t place = 0, uint8_t value = 0) {
  return {static_cast<uint8_t>(what), flags, place, value};
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const Event step = event_of(What::kStep), complete = event_of(What::kComplete);
  for (uint8_t geometry = 0; geometry < 4; ++geometry) {
    const Settings settings{geometry, 15, 0x5a, 0, 0};
    const auto seed = [&] { return Seed().add(settings).add(step).add(complete).add(step); };
    all.push_back(seed().add(complete));
    all.push_back(seed().add(event_of(What::kComplete, kSpoiled, 70, 4)));
    all.push_back(seed().add(event_of(What::kComplete, kSpoiled, 16, 1)));
    all.push_back(seed().add(event_of(What::kComplete, kSpoiled, 0, 1)));
    all.push_back(seed().add(event_of(What::kComplete, kScans)));
    all.push_back(seed().add(event_of(What::kComplete, kOtherTag, 2)));
    for (uint8_t result = 0; result < 8; ++result)
      all.push_back(seed().add(event_of(What::kComplete, kOtherResult, 0, result)));
    all.push_back(seed().add(event_of(What::kRewind)).add(complete));
    all.push_back(seed().add(complete).add(step).add(event_of(What::kRewind)).add(step).add(complete));
    all.push_back(seed().add(event_of(What::kDemand, 0, 0)).add(event_of(What::kDemand, 0, 2)).add(complete));
    all.push_back(Seed()
                      .add(settings)
                      .add(step)
                      .add(event_of(What::kComplete, kScans))
                      .add(event_of(What::kStep, kEarly))
                      .add(event_of(What::kStep, kFull))
                      .add(event_of(What::kStep, kCut)));
    all.push_back(Seed().add(Settings{geometry, 15, 0x5a, 0, 1}).add(step).add(complete));
    all.push_back(Seed().add(Settings{geometry, 15, 0x5a, 0x81, 0}).add(step).add(complete));
    all.push_back(seed().add(event_of(What::kComplete, kRaw)).fill(80, 1));
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto* const sessions = [] {
    auto* all = new std::vector<std::unique_ptr<Session>>;
    for (const auto& page_counts : kGeometries) all->push_back(std::make_unique<Session>(page_counts));
    return all;
  }();
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  Model model(*(*sessions)[settings.geometry % sessions->size()], settings);
  for (size_t i = 0; i < kEventsMax && !input.empty(); ++i) {
    const auto event = input.take<Event>();
    switch (static_cast<What>(event.what % 4)) {
      case What::kStep:
        if (model.may_ask()) model.step(event.flags);
        break;
      case What::kComplete:
        // Also of a session that has failed: those of one poll are not looked at one by one.
        model.complete(event, input);
        break;
      case What::kDemand:
        model.demand(event);
        break;
      case What::kRewind:
        model.rewind();
        break;
    }
  }
  // An honest source from here on: everything becomes known. Each part takes at least one byte of bits.
  for (size_t i = 0; model.may_ask() && !model.is_finished(); ++i) {
    VMG_CHECK(i < 400);
    model.step(0);
    model.complete(event_of(What::kComplete), input);
  }
  return 0;
}
