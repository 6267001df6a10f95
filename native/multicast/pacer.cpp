#include "multicast/pacer.hpp"

#include <algorithm>

#include "multicast/datagram/limits.hpp"

namespace vmigrate::multicast {
namespace {

/// One phase is long enough to show in the samples: several reports.
constexpr uint64_t kPhaseNs = 60 * kMs;
constexpr std::array<double, 8> kGains{1.25, 0.75, 1, 1, 1, 1, 1, 1};
constexpr size_t kSlowPhase = 1;
constexpr double kStartGain = 2;
/// The start is over when so many phases have brought less than this.
constexpr double kStartGrowth = 1.25;
constexpr int kFlatPhasesMax = 2;
/// What arrived is measured over at least this time, and this many datagrams, so that it is no accident.
constexpr uint64_t kSampleNs = 40 * kMs;
constexpr uint64_t kSampleDatagrams = 16;
constexpr uint64_t kSampleNsMax = 200 * kMs;
/// Samples count for a little longer than a round of all phases: the fast and the slow one are among them.
constexpr uint64_t kWindowNs = kPhaseNs * (kGains.size() + 2);
/// Loss by chance that the rate is corrected for.
constexpr double kChanceLossMax = 0.3;
constexpr double kUsefulShare = 0.25;
/// In which time what a receiver could take in is forgotten.
constexpr double kBestFadesNs = 5'000.0 * kMs;
/// A receiver that has said nothing for this long does not count.
constexpr uint64_t kHeardNs = 500 * kMs;
/// How often what has been sent is noted.
constexpr uint64_t kSentNs = 5 * kMs;
/// A sender that sends less than this share of what it may is not kept by its receivers.
constexpr double kSlowlySent = 0.92;
constexpr double kAboutAll = 0.9;
constexpr uint64_t kHalvingNs = 200 * kMs;
constexpr uint64_t kLookNs = 5 * kMs;
constexpr double kRateMax = 100e9;

}  // namespace

Pacer::Pacer(const PacerOptions& options)
    : options_(options), start_rate_(static_cast<double>(options.first_bytes_per_s)) {}

uint64_t Pacer::bounded(double bytes_per_s) const {
  double rate = std::clamp(bytes_per_s, static_cast<double>(options_.floor_bytes_per_s), kRateMax);
  if (options_.limit_bytes_per_s != 0) rate = std::min(rate, static_cast<double>(options_.limit_bytes_per_s));
  return static_cast<uint64_t>(rate);
}

void Pacer::report(uint32_t number, const ReceiverReport& report, uint64_t at_ns) {
  const auto [found, is_new] = index_of_member_.try_emplace(number, members_.size());
  if (is_new) members_.emplace_back();
  Member& member = members_[found->second];
  if (member.report_count != 0) {
    const ReceiverReport& last = member.reports[(member.report_count - 1) % kReportsKept];
    if (report.clock_ns <= last.clock_ns || report.highest_sequence < last.highest_sequence ||
        report.received_datagrams < last.received_datagrams || report.received_bytes < last.received_bytes) {
      return;
    }
  }
  member.heard_ns = heard_ns_ = at_ns;
  take_sample(member, report, at_ns);
  member.reports[member.report_count % kReportsKept] = report;
  member.reports_at_ns[member.report_count++ % kReportsKept] = at_ns;
}

void Pacer::sent(uint64_t bytes, uint64_t at_ns) {
  if (sent_count_ != 0 && at_ns - sent_[(sent_count_ - 1) % kSentKept].at_ns < kSentNs) return;
  sent_[sent_count_++ % kSentKept] = {at_ns, bytes};
}

/// Whether less was sent in this time than the rate allowed, and the receiver has got about all of it. Its
/// report may be about what was sent a little earlier, so the time is not exact.
bool Pacer::was_sent_slowly(double received_bytes, uint64_t from_ns, uint64_t to_ns) const {
  const Sent* first = nullptr;
  const Sent* last = nullptr;
  const size_t kept = std::min(sent_count_, kSentKept);
  for (size_t back = 1; back <= kept; ++back) {
    const Sent& sent = sent_[(sent_count_ - back) % kSentKept];
    if (sent.at_ns > to_ns) continue;
    if (last == nullptr) last = &sent;
    first = &sent;
    if (sent.at_ns <= from_ns) break;
  }
  if (last == nullptr || first == last) return false;
  const auto bytes = static_cast<double>(last->bytes - first->bytes);
  const double rate = bytes * 1e9 / static_cast<double>(last->at_ns - first->at_ns);
  return rate < kSlowlySent * estimate_ && received_bytes >= kAboutAll * bytes;
}

/// Compares with the latest earlier report that is far enough back.
void Pacer::take_sample(Member& member, const ReceiverReport& report, uint64_t at_ns) const {
  const size_t kept = std::min(member.report_count, kReportsKept);
  for (size_t back = 1; back <= kept; ++back) {
    const size_t index = (member.report_count - back) % kReportsKept;
    const ReceiverReport& base = member.reports[index];
    // Whichever clock says that more time has passed: a report that was held up, or a receiver that was,
    // makes the other one look short.
    const uint64_t duration_ns =
        std::max(report.clock_ns - base.clock_ns, at_ns - member.reports_at_ns[index]);
    const uint64_t sent = report.highest_sequence - base.highest_sequence;
    if (duration_ns < kSampleNsMax && (duration_ns < kSampleNs || sent < kSampleDatagrams)) continue;
    const auto received = static_cast<double>(report.received_datagrams - base.received_datagrams);
    const auto received_bytes = static_cast<double>(report.received_bytes - base.received_bytes);
    const double loss = sent == 0 ? 0 : std::clamp(1 - received / static_cast<double>(sent), 0.0, 1.0);
    const double bytes_per_s = received_bytes * 1e9 / static_cast<double>(duration_ns);
    const bool keeps_up = was_sent_slowly(received_bytes / std::max(0.01, 1 - std::min(loss, kChanceLossMax)),
                                          member.reports_at_ns[index], at_ns);
    const double fastest = fastest_ == 0 ? kRateMax : std::max(fastest_, fastest_before_);
    member.samples[member.sample_count++ % kSamplesKept] = {at_ns, std::min(bytes_per_s, fastest), loss,
                                                            keeps_up};
    return;
  }
}

/// The fastest that a receiver has taken in within the window, corrected for what is lost at any rate. 0: not
/// known, or it is not heard any more.
double Pacer::drain_of(const Member& member, uint64_t at_ns) const {
  if (at_ns - member.heard_ns > kHeardNs) return 0;
  double best = 0, chance_loss = kChanceLossMax;
  bool keeps_up = false;
  const size_t kept = std::min(member.sample_count, kSamplesKept);
  for (size_t back = 1; back <= kept; ++back) {
    const Sample& sample = member.samples[(member.sample_count - back) % kSamplesKept];
    // The last one counts however old it is.
    if (back > 1 && at_ns - sample.at_ns > kWindowNs) break;
    best = std::max(best, sample.bytes_per_s);
    chance_loss = std::min(chance_loss, sample.loss);
    keeps_up |= sample.keeps_up;
  }
  const double drain = best / (1 - chance_loss);
  return keeps_up ? std::max(drain, estimate_) : drain;
}

/// Makes the estimates anew. Who is useful is judged by what the median receiver could take in of late: while
/// the group goes as a slow one, the others show no more than that.
void Pacer::look(uint64_t at_ns) {
  const double fading = 1 - std::min(1.0, static_cast<double>(at_ns - looked_ns_) / kBestFadesNs);
  looked_ns_ = at_ns;
  drains_.clear();
  bests_.clear();
  for (Member& member : members_) {
    const double drain = member.sample_count == 0 ? 0 : drain_of(member, at_ns);
    if (drain <= 0) continue;
    member.best_bytes_per_s = std::max(drain, member.best_bytes_per_s * fading);
    drains_.push_back(drain);
    bests_.push_back(member.best_bytes_per_s);
  }
  if (drains_.empty()) return;
  const auto median_of = [](std::vector<double>& values) {
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  };
  median_ = median_of(drains_);
  const double useful_from = median_of(bests_) * kUsefulShare;
  // If none is useful any more the network has become slow for all of them.
  estimate_ = median_;
  for (const double drain : drains_)
    if (drain >= useful_from) estimate_ = std::min(estimate_, drain);
}

/// The start goes on as long as the median receiver takes in more. So a slow one among fast ones shows.
void Pacer::advance(uint64_t at_ns) {
  if (at_ns - phase_ns_ < kPhaseNs) return;
  phase_ns_ = at_ns;
  if (!is_starting_) {
    phase_ = (phase_ + 1) % kGains.size();
    return;
  }
  if (median_ == 0) return;
  if (median_ >= best_of_start_ * kStartGrowth) {
    best_of_start_ = median_;
    flat_phases_ = 0;
    start_rate_ = std::max(start_rate_, median_ * kStartGain);
  } else if (++flat_phases_ >= kFlatPhasesMax) {
    is_starting_ = false;
    phase_ = kSlowPhase;  // queues are full
  }
}

void Pacer::begin_again(double bytes_per_s) {
  is_starting_ = true;
  start_rate_ = bytes_per_s;
  best_of_start_ = median_ = estimate_ = 0;
  flat_phases_ = 0;
}

uint64_t Pacer::rate_bytes_per_s(uint64_t at_ns) {
  if (!is_begun_) {
    is_begun_ = true;
    phase_ns_ = fastest_ns_ = at_ns;
    heard_ns_ = std::max(heard_ns_, at_ns);
    looked_ns_ = at_ns;
  }
  if (at_ns - looked_ns_ >= kLookNs) {
    look(at_ns);
    advance(at_ns);
  }
  if (at_ns - heard_ns_ > kHeardNs && at_ns - halved_ns_ >= kHalvingNs) {
    halved_ns_ = at_ns;
    begin_again(static_cast<double>(bounded(static_cast<double>(rate_) / 2)));
  }
  rate_ = bounded(is_starting_ ? start_rate_ : estimate_ * kGains[phase_]);
  if (at_ns - fastest_ns_ >= kWindowNs) {
    fastest_ns_ = at_ns;
    fastest_before_ = fastest_;
    fastest_ = 0;
  }
  fastest_ = std::max(fastest_, static_cast<double>(rate_));
  return rate_;
}

}  // namespace vmigrate::multicast
