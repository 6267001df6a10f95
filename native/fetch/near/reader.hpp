#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "fetch/fetch_table.hpp"
#include "fetch/near/holders.hpp"

namespace vmigrate::pager {

/// What bulk reads from one near holder, in passes over all pages. It reads the states of a window of pages
/// there, and when that READ has completed it claims and reads the runs that are present there and absent
/// here. A page that was present stays what it is, so the two READs may be any time apart. Thread of near
/// bulk.
class NearReader {
 public:
  /// The passes begin at the page with this number, counted through all regions.
  NearReader(FetchCore& core, NearLink near, uint64_t first_page);

  NearHolder& holder() { return *near_.holder; }
  int event_fd() const { return near_.link.endpoint->event_fd(); }
  uint64_t bytes_in_flight() const { return fetches_.bytes(); }
  /// Why it cannot be used any more.
  const std::optional<Error>& failure() const { return failure_; }
  /// When the holder counts as silent; UINT64_MAX: nothing is asked of it.
  uint64_t silent_ns() const { return is_waiting() ? heard_ns_ + kNearerSilentNs : UINT64_MAX; }
  /// When the next pass begins.
  uint64_t due_ns() const { return due_ns_; }
  /// A whole pass has found nothing that the holder can still bring.
  bool is_exhausted() const { return is_exhausted_; }
  /// A page has become absent again: the next pass begins at once.
  void look_again();
  /// A clone has touched this page: those behind it are looked for first. A hint.
  void follow(uint32_t region_index, PageIndex page);

  enum class Step : uint8_t { kNothing = 1, kLooks, kClaimed };
  /// Does the next thing: claims and asks for a run of about this many bytes, or looks where there is one.
  /// kNothing: an answer, the next pass or a free place is missing, or the holder is lost.
  Step step(uint64_t at_ns, uint64_t chunk_bytes);
  /// Posts what the transport did not accept before. True: there is more.
  bool post_again();

  struct Polled {
    std::array<Fetch, kCompletionBatchMax> here;
    size_t here_count = 0;
    bool is_any = false;
  };
  /// Looks at some completions. The caller publishes what has come.
  Polled poll(uint64_t at_ns);
  /// Call it before the thread sleeps.
  void sleep() { drop_messages(*near_.link.endpoint); }
  /// Ends the connection, and visits each claimed run, which the caller takes over.
  template <typename Visit>
  void give_up(Visit visit) {
    near_.link.endpoint.reset();  // first: it must not write into pages that are fetched elsewhere
    fetches_.drain(visit);
  }

 private:
  enum class Looking : uint8_t { kNo = 1, kPost, kWait, kKnown };
  static constexpr uint64_t kLookFlag = uint64_t{1} << 63;

  bool is_waiting() const { return fetches_.used_count() != 0 || looking_ == Looking::kWait; }
  uint64_t look_pages_max() const { return near_.states.size(); }
  void fail(ErrorCode code, const char* what) { failure_ = Error{code, 0, what}; }
  bool choose_window(uint64_t at_ns);
  bool next_window();
  void end_pass(uint64_t at_ns);
  void post_look();
  void take_look(const transport::Completion& completion);
  std::optional<PageRun> claim_in_window(uint64_t chunk_bytes);
  void pass_over(uint64_t page_count);

  FetchCore& core_;
  NearLink near_;
  FetchTable fetches_;
  std::optional<Error> failure_;
  uint64_t heard_ns_ = 0;  ///< the last completion, or when the first of what is outstanding was asked

  // --- the pass
  uint32_t region_index_ = 0;  ///< the next page that it looks at
  uint64_t page_ = 0;
  uint64_t pages_left_;       ///< of the pass
  bool has_news_ = false;     ///< something was claimed
  bool has_missing_ = false;  ///< a page is absent here, and not there either
  uint64_t states_read_ = 0;
  bool is_exhausted_ = false;
  uint64_t due_ns_ = 0;
  uint64_t pause_ns_ = kNearPauseNsMin;

  // --- the window
  Looking looking_ = Looking::kNo;
  uint32_t window_region_ = 0;
  PageRun window_;
  uint64_t window_at_ = 0;  ///< kKnown: the next page of the window
  uint64_t look_count_ = 0;

  // --- pages behind a fault, the next window or the present one
  std::optional<PageRun> wanted_;
  uint32_t wanted_region_ = 0;
  bool may_follow_ = true;  ///< after one such window the pass goes on first
};

}  // namespace vmigrate::pager
