#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace vmigrate::multicast {

/// What one receiver has got of the multicast so far. All values only grow. Received bytes and datagrams
/// count each datagram once.
struct ReceiverReport {
  uint64_t clock_ns = 0;  ///< of the receiver; only differences are used
  uint64_t highest_sequence = 0;
  uint64_t received_datagrams = 0;
  uint64_t received_bytes = 0;
};

struct PacerOptions {
  uint64_t limit_bytes_per_s = 0;  ///< 0: none
  uint64_t first_bytes_per_s = 32 << 20;
  uint64_t floor_bytes_per_s = 1 << 20;
};

/// Decides how fast a group is sent to, from what its receivers say arrives. It looks for the rate that the
/// slowest useful receiver takes in, in the way of BBR: for a short time it sends faster than that, then
/// slower to empty the queues that this has filled, then as fast. Datagrams that are still lost while it
/// sends slower are lost by chance, not by speed, so they do not count against the rate. A receiver that
/// takes in less than a quarter of what the median does is not waited for; it reads the rest from others.
///
/// It has no clock and does no input or output. Times are in ns of any one clock and never go back. Bytes are
/// those of datagrams, with their headers. For one thread.
class Pacer {
 public:
  explicit Pacer(const PacerOptions& options);

  /// So many bytes have been sent in all. A sender that does not get to send as fast as it may, because
  /// others have the processor, must say so: what arrives then says little about the receivers. Without this
  /// call it counts as one that does.
  void sent(uint64_t bytes, uint64_t at_ns);
  /// A report that contradicts the member's last one is ignored.
  void report(uint32_t member, const ReceiverReport& report, uint64_t at_ns);
  /// The rate to send with now: at least the floor, or the limit if that is lower.
  uint64_t rate_bytes_per_s(uint64_t at_ns);

 private:
  static constexpr size_t kReportsKept = 32;
  static constexpr size_t kSamplesKept = 64;
  static constexpr size_t kSentKept = 64;
  struct Sample {
    uint64_t at_ns = 0;
    double bytes_per_s = 0;
    double loss = 0;
    bool keeps_up = false;  ///< all that was sent has arrived, or was lost, and that was less than allowed
  };
  struct Sent {
    uint64_t at_ns = 0;
    uint64_t bytes = 0;
  };
  struct Member {
    uint64_t heard_ns = 0;
    std::array<ReceiverReport, kReportsKept> reports;
    std::array<uint64_t, kReportsKept> reports_at_ns;
    size_t report_count = 0;  ///< ever
    std::array<Sample, kSamplesKept> samples;
    size_t sample_count = 0;      ///< ever
    double best_bytes_per_s = 0;  ///< the most that it has taken in; fades
  };
  void take_sample(Member& member, const ReceiverReport& report, uint64_t at_ns) const;
  bool was_sent_slowly(double received_bytes, uint64_t from_ns, uint64_t to_ns) const;
  double drain_of(const Member& member, uint64_t at_ns) const;
  void look(uint64_t at_ns);
  void advance(uint64_t at_ns);
  void begin_again(double bytes_per_s);
  uint64_t bounded(double bytes_per_s) const;

  const PacerOptions options_;
  std::vector<Member> members_;
  std::unordered_map<uint32_t, size_t> index_of_member_;
  std::array<Sent, kSentKept> sent_;
  size_t sent_count_ = 0;               ///< ever
  std::vector<double> drains_, bests_;  ///< of look
  uint64_t heard_ns_ = 0;               ///< the last report of anybody, or the beginning
  bool is_begun_ = false;
  uint64_t looked_ns_ = 0;   ///< when the two estimates were made
  double estimate_ = 0;      ///< what the slowest useful receiver takes in; 0: not known yet
  double median_ = 0;        ///< what the median receiver takes in
  bool is_starting_ = true;  ///< doubles the rate until receivers take in no more
  double best_of_start_ = 0;
  int flat_phases_ = 0;
  uint64_t phase_ns_ = 0;  ///< when the present phase began
  size_t phase_ = 0;
  double start_rate_ = 0;
  uint64_t halved_ns_ = 0;  ///< when the rate was last halved because nobody is heard
  uint64_t rate_ = 0;       ///< the last answer
  /// The fastest rate of late: nobody can have received faster.
  double fastest_ = 0, fastest_before_ = 0;
  uint64_t fastest_ns_ = 0;
};

}  // namespace vmigrate::multicast
