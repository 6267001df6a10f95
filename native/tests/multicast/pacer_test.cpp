// Tests the pacing against models of receivers and of the network between: what it must find out, for links
// of many speeds and for many kinds of loss.

#include "multicast/pacer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace vmigrate::multicast {
namespace {

constexpr uint64_t kMs = 1'000'000;
constexpr double kDatagramBytes = 4144;

/// A path to a receiver: a link or a reader that takes in so much, a queue before it, and chance.
struct Path {
  double bytes_per_s = 1e12;
  double queue_bytes = 1 << 20;
  double loss = 0;
  bool reports = true;
};

class Model {
 public:
  Model(std::vector<Path> paths, uint64_t limit_bytes_per_s, uint32_t seed)
      : pacer_({.limit_bytes_per_s = limit_bytes_per_s}), random_(seed) {
    for (const Path& path : paths) receivers_.push_back({path});
  }

  /// Lets time pass, and returns the mean rate of sending in it.
  double run(uint64_t duration_ns) {
    double sent = 0;
    const uint64_t end_ns = at_ns_ + duration_ns;
    for (; at_ns_ < end_ns; at_ns_ += kMs) {
      rate = pacer_.rate_bytes_per_s(at_ns_);
      slowest = std::min(slowest, rate);
      credit_ += static_cast<double>(rate) / 1000;
      for (; credit_ >= kDatagramBytes; credit_ -= kDatagramBytes, sent += kDatagramBytes) send();
      for (Receiver& receiver : receivers_) receive(receiver);
    }
    return sent * 1e9 / static_cast<double>(duration_ns);
  }
  Path& path(size_t index) { return receivers_[index].path; }

  uint64_t rate = 0, slowest = UINT64_MAX;

 private:
  struct Receiver {
    Path path;
    std::vector<uint64_t> queue{};
    double room = 0;  ///< bytes that it can take in now
    ReceiverReport got{};
    uint64_t next_report_ns = 0;
  };
  void send() {
    ++sequence_;
    for (Receiver& receiver : receivers_) {
      if (static_cast<double>(receiver.queue.size()) * kDatagramBytes >= receiver.path.queue_bytes) continue;
      if (std::uniform_real_distribution<>(0, 1)(random_) < receiver.path.loss) continue;
      receiver.queue.push_back(sequence_);
    }
  }
  void receive(Receiver& receiver) {
    receiver.room = std::min(receiver.room + receiver.path.bytes_per_s / 1000,
                             std::max(receiver.path.bytes_per_s / 200, 2 * kDatagramBytes));
    size_t taken = 0;
    while (taken < receiver.queue.size() && receiver.room >= kDatagramBytes) {
      receiver.room -= kDatagramBytes;
      receiver.got.highest_sequence = receiver.queue[taken++];
      ++receiver.got.received_datagrams;
      receiver.got.received_bytes += static_cast<uint64_t>(kDatagramBytes);
    }
    receiver.queue.erase(receiver.queue.begin(), receiver.queue.begin() + static_cast<std::ptrdiff_t>(taken));
    if (!receiver.path.reports || receiver.got.received_datagrams == 0 || at_ns_ < receiver.next_report_ns)
      return;
    receiver.got.clock_ns = at_ns_ + 12345;
    pacer_.report(static_cast<uint32_t>(&receiver - receivers_.data()) + 1, receiver.got, at_ns_);
    receiver.next_report_ns = at_ns_ + (15 + random_() % 10) * kMs;
  }

  Pacer pacer_;
  std::mt19937 random_;
  std::vector<Receiver> receivers_;
  uint64_t at_ns_ = 1'000'000'000'000;
  uint64_t sequence_ = 0;
  double credit_ = 0;
};

constexpr uint64_t kSettleNs = 3000 * kMs, kLookNs = 3000 * kMs;

/// Mean rate once it has settled.
double settled(Model& model) {
  model.run(kSettleNs);
  return model.run(kLookNs);
}

TEST(Pacer, EndsAtWhatTheBottleneckTakes) {
  for (uint32_t seed = 0; seed < 24; ++seed) {
    std::mt19937 random(seed);
    const double capacity = 4e6 * std::pow(10, (random() % 1000) / 500.0);  // 4 to 400 MB/s
    const double queue = capacity * (0.005 + (random() % 1000) / 10'000.0);
    const double loss = random() % 2 == 0 ? 0 : (random() % 100) / 1000.0;
    Model model({{capacity, queue, loss}}, 0, seed);
    const double rate = settled(model);
    EXPECT_LT(rate, 1.1 * capacity / (1 - loss)) << seed;
    EXPECT_GT(rate, 0.85 * capacity) << seed;
  }
}

TEST(Pacer, IsNotSlowedDownByLossOfChance) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const double limit = 5e6 * std::pow(10, (random() % 1000) / 600.0);
    std::vector<Path> clean(1 + random() % 4), lossy = clean;
    for (Path& path : lossy) path.loss = 0.1;
    Model first(clean, static_cast<uint64_t>(limit), seed), second(lossy, static_cast<uint64_t>(limit), seed);
    const double unlost = settled(first);
    EXPECT_GT(unlost, 0.9 * limit);
    EXPECT_GT(settled(second), 0.85 * unlost) << seed;
    // Of a link that is slower than the limit, too.
    for (std::vector<Path>* paths : {&clean, &lossy})
      for (Path& path : *paths) path.bytes_per_s = limit / 3;
    Model third(clean, static_cast<uint64_t>(limit), seed), fourth(lossy, static_cast<uint64_t>(limit), seed);
    const double slow = settled(third);
    EXPECT_GT(settled(fourth), 0.85 * slow) << seed;
  }
}

TEST(Pacer, FindsAFastLinkSoon) {
  Model model({{1e9, 8e6, 0}, {1e9, 8e6, 0.02}}, 0, 1);
  model.run(1500 * kMs);
  EXPECT_GT(model.run(1000 * kMs), 0.8e9);
}

TEST(Pacer, NeverExceedsTheLimit) {
  Model model({{}, {}}, 20'000'000, 3);
  for (int i = 0; i < 5000; ++i) {
    model.run(kMs);
    ASSERT_LE(model.rate, 20'000'000u);
  }
  EXPECT_GT(model.rate, 10'000'000u);
  Model slow({{}}, 100'000, 3);  // less than the floor
  slow.run(2000 * kMs);
  EXPECT_LE(slow.rate, 100'000u);
}

TEST(Pacer, GoesAsTheSlowestUsefulReceiver) {
  Model model({{200e6}, {180e6}, {100e6}, {220e6}}, 0, 5);
  const double rate = settled(model);
  EXPECT_LT(rate, 110e6);
  EXPECT_GT(rate, 85e6);
}

TEST(Pacer, DoesNotWaitForAStarvedReceiver) {
  for (const size_t count : {2u, 3u, 8u}) {
    std::vector<Path> paths(count, Path{100e6});
    paths.back().bytes_per_s = 10e6;
    Model model(paths, 0, 9);
    EXPECT_GT(settled(model), 85e6) << count;
  }
  // One that starves later, and recovers.
  Model model({{100e6}, {100e6}, {100e6}}, 0, 9);
  model.run(2000 * kMs);
  model.path(0).bytes_per_s = 1e6;
  model.run(1000 * kMs);
  EXPECT_GT(model.run(2000 * kMs), 85e6);
  // A receiver that is alone is waited for, however slow it is.
  Model alone({{2e6}}, 0, 9);
  EXPECT_LT(settled(alone), 2.3e6);
}

TEST(Pacer, FollowsALinkThatChanges) {
  Model model({{100e6, 1e6}}, 0, 11);
  EXPECT_GT(settled(model), 85e6);
  model.path(0).bytes_per_s = 20e6;
  const double slower = settled(model);
  EXPECT_LT(slower, 22e6);
  EXPECT_GT(slower, 17e6);
  model.path(0).bytes_per_s = 100e6;
  model.run(5000 * kMs);
  EXPECT_GT(model.run(2000 * kMs), 80e6);
}

TEST(Pacer, SlowsDownWithoutReportsAndNeverStops) {
  Model model({{100e6}}, 0, 13);
  model.run(2000 * kMs);
  EXPECT_GT(model.rate, 60'000'000u);
  model.path(0).reports = false;
  model.run(10'000 * kMs);
  EXPECT_EQ(model.rate, PacerOptions{}.floor_bytes_per_s);
  EXPECT_EQ(model.slowest, PacerOptions{}.floor_bytes_per_s);
  model.path(0).reports = true;
  model.run(2000 * kMs);
  EXPECT_GT(model.rate, 60'000'000u);
  // Nobody has ever said anything.
  Pacer silent({});
  uint64_t at_ns = 5;
  EXPECT_EQ(silent.rate_bytes_per_s(at_ns), PacerOptions{}.first_bytes_per_s);
  for (int i = 0; i < 10'000; ++i) EXPECT_GT(silent.rate_bytes_per_s(at_ns += kMs), 0u);
  EXPECT_EQ(silent.rate_bytes_per_s(at_ns), PacerOptions{}.floor_bytes_per_s);
}

/// A member may say what it likes; it can slow a group down to a quarter, and not stop it or make it run
/// wild.
TEST(Pacer, LiesOfAMemberHaveBounds) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937_64 random(seed);
    Model honest({{50e6}, {50e6}, {50e6}}, 0, seed);
    honest.run(2000 * kMs);
    Pacer pacer({.limit_bytes_per_s = 100'000'000});
    uint64_t at_ns = kMs;
    for (int i = 0; i < 2000; ++i) {
      ASSERT_LE(pacer.rate_bytes_per_s(at_ns), 100'000'000u);
      ASSERT_GE(pacer.rate_bytes_per_s(at_ns), PacerOptions{}.floor_bytes_per_s);
      const auto wild = [&] { return random() >> random() % 64; };
      pacer.report(static_cast<uint32_t>(1 + random() % 3), {wild(), wild(), wild(), wild()}, at_ns);
      at_ns += random() % (30 * kMs);
    }
  }
}

}  // namespace
}  // namespace vmigrate::multicast
