#pragma once

// Groups on the loopback interface, files to send, receivers that keep what they get, and ports that lose,
// repeat, reorder and forge.

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "base/page_key.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/datagram/writer.hpp"
#include "multicast/receiver.hpp"
#include "multicast/sender.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::test {

/// A group that no other test of this machine uses.
inline multicast::Group random_group(uint32_t mtu_bytes = 0) {
  std::random_device random;
  multicast::Group group;
  group.provider = "udp";
  group.address = "239." + std::to_string(random() % 256) + "." + std::to_string(random() % 256) + "." +
                  std::to_string(1 + random() % 250);
  group.port = static_cast<uint16_t>(20'000 + random() % 12'000);
  group.interface_address = "127.0.0.1";
  for (uint8_t& byte : group.key) byte = static_cast<uint8_t>(random());
  group.session = uint64_t{random()} << 32 | random();
  group.mtu_bytes = mtu_bytes;
  return group;
}

/// Files with a pattern and holes.
class SentFiles {
 public:
  using HasData = std::function<bool(uint64_t)>;
  struct Spec {
    uint64_t page_count;
    HasData has_data = [](uint64_t) { return true; };
  };
  using Specs = std::vector<Spec>;
  explicit SentFiles(const Specs& specs) {
    for (size_t i = 0; i < specs.size(); ++i) {
      const std::string path = dir_ / ("ram" + std::to_string(i));
      const uint64_t length_bytes = specs[i].page_count * kPage;
      EXPECT_TRUE(memory::Region::create_file(path, length_bytes, kPage).ok());
      files.push_back({path, length_bytes, kPage});
      fds.emplace_back(::open(path.c_str(), O_RDWR | O_CLOEXEC));
      std::vector<bool> pages;
      for (uint64_t page = 0; page < specs[i].page_count; ++page) {
        pages.push_back(specs[i].has_data(page));
        if (!pages.back()) continue;
        write_pattern(fds[i].get(), i + 1, page);
        ++data_pages;
      }
      data.push_back(std::move(pages));
    }
  }

  TempDir dir_;
  std::vector<pager::RegionFileConfig> files;
  std::vector<UniqueFd> fds;
  std::vector<std::vector<bool>> data;
  uint64_t data_pages = 0;
};

/// Keeps which pages have come, and checks their bytes.
class CheckingSink final : public multicast::PageSink {
 public:
  explicit CheckingSink(const SentFiles& files) {
    for (const auto& pages : files.data) came_.emplace_back(pages.size(), false);
  }
  uint64_t page_count(uint32_t region) const override {
    return region < came_.size() ? came_[region].size() : 0;
  }
  bool wants(uint32_t region, PageIndex page) const override { return !came(region, raw(page)); }
  void take(uint32_t region, PageIndex page, std::span<const std::byte> bytes) override {
    if (const int us = delay_us.load(); us > 0) ::usleep(static_cast<useconds_t>(us));
    uint64_t words[kPage / 8];
    std::memcpy(words, bytes.data(), kPage);
    bool is_good = bytes.size() == kPage;
    for (uint64_t word = 0; word < kPage / 8; ++word)
      is_good &= words[word] == pattern_word(region + 1, raw(page), word);
    if (!is_good) ++bad_pages;
    const std::lock_guard lock(mutex_);
    came_[region][raw(page)] = true;
    order.push_back(pager::page_key(region, page));
  }
  size_t wanted(std::span<uint64_t> out) override {
    const std::lock_guard lock(mutex_);
    size_t count = 0;
    for (; count < out.size() && !wants_.empty(); wants_.pop_front()) out[count++] = wants_.front();
    return count;
  }
  bool must_end() const override { return ends.load(); }

  void want(uint64_t wanted) {
    const std::lock_guard lock(mutex_);
    wants_.push_back(wanted);
  }
  size_t count() const {
    const std::lock_guard lock(mutex_);
    return order.size();
  }
  bool came(uint32_t region, uint64_t page) const {
    const std::lock_guard lock(mutex_);
    return came_[region][page];
  }

  std::atomic<uint64_t> bad_pages{0};
  std::atomic<int> delay_us{0};
  std::atomic<bool> ends{false};
  std::vector<pager::PageKey> order;  ///< read it when the receiver has ended

 private:
  std::vector<std::vector<bool>> came_;
  mutable std::mutex mutex_;
  std::deque<uint64_t> wants_;
};

/// Wraps a receiver's port: loses, repeats and delays what it receives.
class LossyPort final : public multicast::DatagramPort, private multicast::DatagramVisitor {
 public:
  struct Faults {
    double loss = 0, repeat = 0;
    size_t reorder = 0;  ///< a datagram may be held back while so many others pass
    double report_loss = 0;
    std::function<bool(std::span<const std::byte>)> loses{};
  };
  LossyPort(std::unique_ptr<multicast::DatagramPort> port, Faults faults, uint32_t seed)
      : port_(std::move(port)), faults_(std::move(faults)), random_(seed) {}

  size_t datagram_bytes_max() const override { return port_->datagram_bytes_max(); }
  size_t overhead_bytes() const override { return port_->overhead_bytes(); }
  int event_fd() const override { return port_->event_fd(); }
  Status send(std::span<const std::byte> bytes, size_t datagram_bytes) override {
    return port_->send(bytes, datagram_bytes);
  }
  Result<size_t> receive(multicast::DatagramVisitor& visitor) override {
    visitor_ = &visitor;
    const auto count = port_->receive(*this);
    // Nothing overtakes what is held back any more.
    if (count.ok() && count.value() == 0) {
      for (const auto& held : held_) visitor.on_datagram(held);
      const size_t held_count = held_.size();
      held_.clear();
      return held_count;
    }
    return count;
  }
  void adopt_source() override { port_->adopt_source(); }
  void answer(std::span<const std::byte> datagram) override {
    if (!happens(faults_.report_loss)) port_->answer(datagram);
  }

 private:
  bool happens(double chance) { return std::uniform_real_distribution<>(0, 1)(random_) < chance; }
  void on_datagram(std::span<const std::byte> datagram) override {
    if (happens(faults_.loss) || (faults_.loses && faults_.loses(datagram))) return;
    if (happens(faults_.repeat)) visitor_->on_datagram(datagram);
    if (faults_.reorder == 0) return visitor_->on_datagram(datagram);
    held_.emplace_back(datagram.begin(), datagram.end());
    if (held_.size() <= faults_.reorder) return;
    const auto chosen = held_.begin() + static_cast<std::ptrdiff_t>(random_() % held_.size());
    visitor_->on_datagram(*chosen);
    held_.erase(chosen);
  }

  std::unique_ptr<multicast::DatagramPort> port_;
  const Faults faults_;
  std::mt19937 random_;
  multicast::DatagramVisitor* visitor_ = nullptr;
  std::vector<std::vector<std::byte>> held_;
};

inline std::unique_ptr<multicast::DatagramPort> open_test_port(const multicast::Group& group,
                                                               multicast::Role role) {
  auto port = multicast::open_port(group, role);
  EXPECT_TRUE(port.ok()) << port.error().what << ": " << strerror(port.error().system_errno);
  return std::move(port).value();
}

inline std::unique_ptr<multicast::MulticastReceiver> open_receiver(const multicast::Group& group,
                                                                   uint16_t member, CheckingSink& sink,
                                                                   const LossyPort::Faults& faults = {}) {
  multicast::ReceiverConfig config;
  config.group = group;
  config.member = member;
  config.sink = &sink;
  config.port =
      std::make_unique<LossyPort>(open_test_port(group, multicast::Role::kReceiver), faults, member);
  auto receiver = multicast::MulticastReceiver::open(std::move(config));
  EXPECT_TRUE(receiver.ok()) << receiver.error().what;
  return std::move(receiver).value();
}

inline std::unique_ptr<multicast::MulticastSender> open_sender(const multicast::Group& group,
                                                               const SentFiles& files,
                                                               uint64_t bandwidth_bytes_per_s = 0) {
  multicast::SenderConfig config;
  config.image = files.files;
  config.group = group;
  config.bandwidth_bytes_per_s = bandwidth_bytes_per_s;
  auto sender = multicast::MulticastSender::open(std::move(config));
  EXPECT_TRUE(sender.ok()) << sender.error().what << ": " << strerror(sender.error().system_errno);
  return std::move(sender).value();
}

inline bool reaches(const multicast::MulticastReceiver& receiver, multicast::ReceiverState state) {
  return eventually([&] { return receiver.state() == state; });
}
inline bool reaches(const multicast::MulticastSender& sender, multicast::SenderState state) {
  return eventually([&] { return sender.state() == state; });
}

}  // namespace vmigrate::test
