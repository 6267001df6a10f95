#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tests/fuzz/support/near_model.hpp"

namespace vmigrate::fuzz {

/// kHonestEnd: see NearDrive::finish. It takes as long as all before, so not each input has it.
enum Mode : uint8_t { kDemandLane = 1, kDevice = 2, kHonestEnd = 4 };
/// How an input begins. Events follow.
struct Settings {
  uint8_t mode;
  uint8_t geometry;
  uint8_t window_pages;  ///< that bulk looks at at once
  uint16_t first_page;
  uint16_t pattern;  ///< states at the holder, two bits each
} __attribute__((packed));
enum class What : uint8_t { kAsk = 0, kAnswer, kPoll, kPost, kOther, kFollow, kKnown, kHolder };
enum Flags : uint8_t {
  kSpoiled = 1,  // of an answer
  kRaw = 2,      // the states follow
  kOtherTag = 4,
  kOtherResult = 8,
  kTwice = 16,
  kCut = 1,      // of a post
  kGivesUp = 1,  // of others
  kRefused = 1,  // of a poll
};
struct Event {
  uint8_t what;
  uint8_t flags;
  uint16_t place;
  uint8_t value;
} __attribute__((packed));

/// What a reader of bulk and a lane for demand have in common: a holder, and what becomes of pages that have
/// come. Each derived class drives one of them.
class NearDrive {
 public:
  /// `states_max`: states that are read at once.
  NearDrive(Filling& filling, const Settings& settings, size_t states_max);
  virtual ~NearDrive() = default;
  NearDrive(const NearDrive&) = delete;
  NearDrive& operator=(const NearDrive&) = delete;

  void take(const Event& event, Input& input);
  /// From here on the holder is honest and has everything, and all of it comes.
  void finish(Input& input);
  /// True: the holder is lost.
  virtual bool has_failed() const = 0;
  /// The end: what was claimed for the holder is somebody else's.
  virtual void give_up() = 0;

 protected:
  virtual void ask(const Event& event) = 0;
  virtual void post() = 0;
  virtual void poll(bool refuses) = 0;
  virtual void follow(const Event& /*event*/) {}
  virtual void look_again() {}
  virtual bool has_all() const = 0;
  virtual void ask_for_all() {}

  uint32_t region_of(const Event& event) const { return event.value / 4 % filling_.region_count(); }
  PageIndex page_of(const Event& event) const {
    return PageIndex{event.place % filling_.page_count(region_of(event))};
  }
  /// What the next poll must give.
  NearModel::Outcome judge();
  void end_claim(uint32_t region_index, PageRun run, bool gives_up);
  static void check_failure(const std::optional<Error>& failure, const std::optional<ErrorCode>& expected);
  /// To post fails only on a connection that is cut.
  void check_post(const std::optional<Error>& failure) const;
  void check(const pager::NearHolder& holder, uint64_t silent_ns);
  void check_end();

  Filling& filling_;
  pager::NearLink near_;  ///< until the derived class has taken it
  NearModel model_;

 private:
  void set_known(uint32_t region_count);
  void set_room(const Event& event);
  void answer(const Event& event, Input& input);
  void write_states(const NearModel::Look& look, const Event& event, Input& input);
  void change_page(const Event& event);

  uint16_t pattern_;
  std::vector<std::pair<uint32_t, PageIndex>> others_;  ///< claimed by somebody else
  uint64_t here_bytes_ = 0;
};

}  // namespace vmigrate::fuzz
