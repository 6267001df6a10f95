// What another host that holds a part of an image may answer: states of its pages, and completions. Once to
// the reader of bulk, and once to the lane of the pages that clones wait for.

#include <array>

#include "fetch/near/demand_lane.hpp"
#include "fetch/near/reader.hpp"
#include "tests/fuzz/support/near_drive.hpp"

namespace vmigrate {
namespace {

using namespace fuzz;
using wire::PageState;

struct Geometry {
  uint64_t page_bytes;
  std::vector<uint64_t> page_counts;
};
/// Of the second a page takes more than one READ.
const Geometry kGeometries[] = {{4096, {5}}, {2 << 20, {3, 2}}, {4096, {24, 3}}};
constexpr uint64_t kChunkBytes[] = {1, 16 << 10, 256 << 10, 8 << 20};
constexpr uint64_t kWindowPagesMax = 30;
constexpr size_t kEventsMax = 60;

class ReaderDrive final : public NearDrive {
 public:
  ReaderDrive(fuzz::Filling& filling, const Settings& settings)
      : NearDrive(filling, settings, 1 + settings.window_pages % kWindowPagesMax),
        holder_(near_.holder),
        reader_(filling.core(), std::move(near_), settings.first_page) {
    for (uint32_t region = 0; region < filling.region_count(); ++region)
      seen_.emplace_back(filling.page_count(region));
  }
  bool has_failed() const override { return reader_.failure().has_value(); }

  void ask(const Event& event) override { (void)step(kChunkBytes[event.value % 4]); }
  void post() override {
    const bool has_more = reader_.post_again();
    take_posted();
    check_post(reader_.failure());
    VMG_CHECK(has_failed() || !has_more || model_.control().room == 0);
    for (const NearModel::Claim& claim : model_.claims())
      VMG_CHECK(has_failed() || has_more || claim.is_absent ||
                claim.posted_bytes == model_.length_bytes(claim));
    check(*holder_, reader_.silent_ns());
  }
  void poll(bool refuses) override {
    const NearModel::Outcome expected = judge();
    const pager::NearReader::Polled polled = reader_.poll(1);
    check_failure(reader_.failure(), expected.failure);
    VMG_CHECK(expected.absent.empty() && polled.here_count == expected.here.size());
    for (const NearModel::Look& look : expected.looks) take_states(look);
    for (size_t i = 0; i < polled.here_count; ++i) {
      const NearModel::Claim& claim = expected.here[i];
      const pager::Fetch& fetch = polled.here[i];
      VMG_CHECK(fetch.region_index == claim.region_index && fetch.run.first == claim.run.first &&
                fetch.run.count == claim.run.count);
      end_claim(claim.region_index, claim.run, refuses);
    }
    VMG_CHECK(has_failed() || reader_.bytes_in_flight() == model_.claimed_bytes());
    check(*holder_, reader_.silent_ns());
  }
  void follow(const Event& event) override { reader_.follow(region_of(event), page_of(event)); }
  void look_again() override { reader_.look_again(); }
  void give_up() override {
    reader_.give_up([&](uint32_t region_index, PageRun run) {
      model_.give_up(region_index, run);
      end_claim(region_index, run, true);
    });
    check_end();
  }

 protected:
  bool has_all() const override { return reader_.is_exhausted() && !model_.is_waiting(); }
  void ask_for_all() override {
    while (!has_failed() && step(kChunkBytes[2]) != pager::NearReader::Step::kNothing) {
    }
  }

 private:
  using Step = pager::NearReader::Step;
  Step step(uint64_t chunk_bytes) {
    const bool was_looking = !model_.looks().empty();
    const uint64_t due_ns = reader_.due_ns();
    const Step step = reader_.step(due_ns == UINT64_MAX ? 1 : due_ns, chunk_bytes);
    const bool has_claimed = take_claim(chunk_bytes);
    VMG_CHECK(has_claimed == (step == Step::kClaimed));
    take_posted();
    VMG_CHECK((!was_looking && !model_.looks().empty()) == (step == Step::kLooks));
    check_post(reader_.failure());
    check(*holder_, reader_.silent_ns());
    if (reader_.is_exhausted()) check_exhausted();
    return step;
  }

  /// Pages that were claimed just now: one run, which the holder has said to have in the last look.
  bool take_claim(uint64_t chunk_bytes) {
    if (!window_) return false;
    const uint32_t region = window_->region_index;
    const auto now = filling_.states(region);
    const auto before = model_.states(region);
    if (fuzz::same(now, before)) return false;
    uint64_t count = 0, page = 0;
    while (now[page] == before[page]) ++page;
    for (; page < now.size() && now[page] != before[page]; ++page, ++count) {
      VMG_CHECK(page >= raw(window_->run.first) && page < raw(window_->run.first) + window_->run.count);
      VMG_CHECK(seen_[region][page] == std::byte(PageState::kPresent));
    }
    VMG_CHECK(count <= filling_.fill().region(region).pages_in(chunk_bytes));
    model_.claim(region, {PageIndex{page - count}, count}, true);
    return true;
  }
  void take_posted() {
    for (const NearModel::Look& look : model_.take_posted()) {
      // Pages of other regions may become zero, whatever a holder has.
      VMG_CHECK(look.region_index < filling_.core().maps_known() && model_.looks().size() == 1);
      window_.reset();
    }
  }
  void take_states(const NearModel::Look& look) {
    window_ = look;
    const auto& buffer = model_.control().locals.back();
    std::copy_n(buffer.base, look.run.count,
                seen_[look.region_index].begin() + static_cast<std::ptrdiff_t>(raw(look.run.first)));
  }
  /// Nothing that is absent here could be had there: the holder has said of all of it that it is zero.
  void check_exhausted() {
    VMG_CHECK(filling_.core().maps_known() == filling_.region_count());
    for (uint32_t region = 0; region < filling_.region_count(); ++region) {
      const auto states = model_.states(region);
      const auto* const end = states.data() + states.size();
      const auto next_absent = [&](const std::byte* from) {
        const void* found = std::memchr(from, 0, static_cast<size_t>(end - from));
        return found != nullptr ? static_cast<const std::byte*>(found) : end;
      };
      for (const auto* at = next_absent(states.data()); at != end; at = next_absent(at + 1))
        VMG_CHECK(seen_[region][static_cast<size_t>(at - states.data())] == std::byte(PageState::kZero));
    }
  }

  const std::shared_ptr<pager::NearHolder> holder_;
  pager::NearReader reader_;
  std::optional<NearModel::Look> window_;     ///< whose states are known
  std::vector<std::vector<std::byte>> seen_;  ///< states at the holder, as it has told them last
};

class LaneDrive final : public NearDrive {
 public:
  LaneDrive(fuzz::Filling& filling, const Settings& settings)
      : NearDrive(filling, settings, pager::kDemandFetchesMax),
        is_device_((settings.mode & kDevice) != 0),
        lane_(filling.core(), std::move(near_), 1) {}
  bool has_failed() const override { return lane_.failure().has_value(); }

  void ask(const Event& event) override {
    const uint32_t region = region_of(event);
    const PageIndex page = page_of(event);
    if (model_.claims().size() == pager::kDemandFetchesMax || !filling_.presence(region).claim(page)) return;
    model_.claim(region, {page, 1}, !is_device_);
    lane_.start(region, page, 1);
    post();
  }
  void post() override {
    const bool had_failed = has_failed();
    lane_.post();
    if (had_failed)
      VMG_CHECK(model_.control().posted.empty());
    else
      check_post(lane_.failure());
    (void)model_.take_posted();
    check_lane();
  }
  void poll(bool refuses) override {
    const NearModel::Outcome expected = judge();
    const pager::NearDemandLane::Polled polled = lane_.poll(1);
    check_failure(lane_.failure(), expected.failure);
    take(std::span(polled.here).first(polled.here_count), expected.here, refuses);
    take(std::span(polled.absent).first(polled.absent_count), expected.absent, true);
    check_lane();
    post();
  }
  void give_up() override {
    lane_.give_up([&](uint32_t region_index, PageIndex page) {
      model_.give_up(region_index, {page, 1});
      end_claim(region_index, {page, 1}, true);
    });
    check_end();
  }

 protected:
  bool has_all() const override { return model_.claims().empty(); }

 private:
  void take(std::span<const pager::NearDemandLane::Claim> got, const std::vector<NearModel::Claim>& expected,
            bool gives_up) {
    VMG_CHECK(got.size() == expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      VMG_CHECK(got[i].region_index == expected[i].region_index && got[i].page == expected[i].run.first);
      end_claim(got[i].region_index, {got[i].page, 1}, gives_up);
    }
  }
  void check_lane() {
    VMG_CHECK(lane_.used_count() == model_.claims().size());
    bool has_unposted = false;
    for (const NearModel::Claim& claim : model_.claims())
      has_unposted |= claim.may_read ? !claim.is_absent && claim.posted_bytes != model_.length_bytes(claim)
                                     : !claim.is_looked_for;
    VMG_CHECK(has_failed() || lane_.has_unposted() == has_unposted);
    check(lane_.holder(), lane_.silent_ns());
  }

  const bool is_device_;
  pager::NearDemandLane lane_;
};

Event event_of(What what, uint8_t flags = 0, uint16_t place = 0, uint8_t value = 0) {
  return {static_cast<uint8_t>(what), flags, place, value};
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const Event known = event_of(What::kKnown, 0, 0, 7), ask = event_of(What::kAsk, 0, 0, 2);
  const Event answer = event_of(What::kAnswer), poll = event_of(What::kPoll);
  for (uint8_t mode = 0; mode < 8; ++mode) {
    for (uint8_t geometry = 0; geometry < 3; ++geometry) {
      const Settings settings{mode, geometry, 29, 2, 0xaae4};
      const auto seed = [&] { return Seed().add(settings).add(known).add(ask); };
      const auto looked = [&] { return seed().add(answer).add(poll).add(ask); };
      all.push_back(looked().add(answer).add(poll));
      all.push_back(looked().add(event_of(What::kAsk, 0, 1, 2)).add(event_of(What::kAnswer, 0, 1)).add(poll));
      all.push_back(looked().add(answer).add(event_of(What::kPoll, kRefused)).add(ask));
      all.push_back(seed().add(event_of(What::kAnswer, kSpoiled, 3, 4)).add(poll));
      all.push_back(seed().add(event_of(What::kAnswer, kOtherTag, 0, 3)).add(poll));
      all.push_back(seed().add(event_of(What::kAnswer, kTwice)).add(poll));
      all.push_back(looked().add(event_of(What::kAnswer, kTwice)).add(poll));
      for (uint8_t result = 0; result < 8; ++result) {
        all.push_back(seed().add(event_of(What::kAnswer, kOtherResult, 0, result)).add(poll));
        all.push_back(looked().add(event_of(What::kAnswer, kOtherResult, 0, result)).add(poll));
      }
      all.push_back(seed().add(event_of(What::kAnswer, kRaw, 0, 5)).fill(5, 2).add(poll).add(ask));
      all.push_back(seed().add(event_of(What::kPost, kCut)).add(poll));
      Seed rounds = seed();  // more than one pass, with pages that the holder never has
      for (int i = 0; i < 18; ++i) rounds.add(answer).add(poll).add(ask);
      all.push_back(rounds);
      // A page of which one part is asked for, and is not there.
      const Event one = event_of(What::kPost, 0, 0, 2), absent = event_of(What::kAnswer, kOtherResult, 0, 7);
      all.push_back(Seed().add(settings).add(known).add(one).add(ask).add(absent).add(poll).add(ask));
      all.push_back(
          seed().add(answer).add(one).add(poll).add(ask).add(absent).add(poll).add(event_of(What::kPost)));
      all.push_back(Seed()
                        .add(settings)
                        .add(known)
                        .add(event_of(What::kPost, 0, 0, 1))
                        .add(ask)
                        .add(event_of(What::kPost)));
      all.push_back(Seed()
                        .add(settings)
                        .add(known)
                        .add(event_of(What::kFollow, 0, 1))
                        .add(event_of(What::kOther, 0, 3))
                        .add(ask)
                        .add(event_of(What::kOther, kGivesUp, 3))
                        .add(event_of(What::kHolder, 0, 0xaaaa)));
    }
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const auto* const fillings = [] {
    auto* all = new std::vector<std::unique_ptr<fuzz::Filling>>;
    for (const Geometry& each : kGeometries)
      all->push_back(std::make_unique<fuzz::Filling>(each.page_counts, each.page_bytes));
    return all;
  }();
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<fuzz::Settings>();
  fuzz::Filling& filling = *(*fillings)[settings.geometry % fillings->size()];
  std::unique_ptr<fuzz::NearDrive> drive;
  if ((settings.mode & kDemandLane) != 0)
    drive = std::make_unique<LaneDrive>(filling, settings);
  else
    drive = std::make_unique<ReaderDrive>(filling, settings);
  for (size_t i = 0; i < kEventsMax && !input.empty() && !drive->has_failed(); ++i)
    drive->take(input.take<fuzz::Event>(), input);
  if (!drive->has_failed() && (settings.mode & fuzz::kHonestEnd) != 0) drive->finish(input);
  drive->give_up();
  return 0;
}
