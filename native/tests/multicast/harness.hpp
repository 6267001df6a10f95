#pragma once

// Groups on the loopback interface, files to send, receivers that keep what they get, and ports that lose,
// repeat, reorder and forge.

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <vector>

#include "base/page_key.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/receiver.hpp"
#include "multicast/sender.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::test {

/// A group that no other test of this machine uses.
multicast::Group random_group(uint32_t mtu_bytes = 0);

/// Files with a pattern and holes.
class SentFiles {
 public:
  using HasData = std::function<bool(uint64_t)>;
  struct Spec {
    uint64_t page_count;
    HasData has_data = [](uint64_t) { return true; };
  };
  using Specs = std::vector<Spec>;
  explicit SentFiles(const Specs& specs);
  ~SentFiles();

  TempDir dir_;
  std::vector<pager::RegionFileConfig> files;
  std::vector<UniqueFd> fds;
  std::vector<std::vector<bool>> data;
  uint64_t data_pages = 0;
};

/// Keeps which pages have come, and checks their bytes.
class CheckingSink final : public multicast::PageSink {
 public:
  explicit CheckingSink(const SentFiles& files);
  ~CheckingSink() override;
  uint64_t page_count(uint32_t region) const override {
    return region < came_.size() ? came_[region].size() : 0;
  }
  bool wants(uint32_t region, PageIndex page) const override { return !came(region, raw(page)); }
  void take(uint32_t region, PageIndex page, std::span<const std::byte> bytes) override;
  size_t wanted(std::span<uint64_t> out) override;
  bool must_end() const override { return ends.load(); }

  void want(uint64_t wanted);
  size_t count() const;
  bool came(uint32_t region, uint64_t page) const;

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
  LossyPort(std::unique_ptr<multicast::DatagramPort> port, Faults faults, uint32_t seed);
  ~LossyPort() override;

  size_t datagram_bytes_max() const override { return port_->datagram_bytes_max(); }
  size_t overhead_bytes() const override { return port_->overhead_bytes(); }
  int event_fd() const override { return port_->event_fd(); }
  Status send(std::span<const std::byte> bytes, size_t datagram_bytes) override;
  Result<size_t> receive(multicast::DatagramVisitor& visitor) override;
  void adopt_source() override { port_->adopt_source(); }
  void answer(std::span<const std::byte> datagram) override;

 private:
  bool happens(double chance);
  void on_datagram(std::span<const std::byte> datagram) override;

  std::unique_ptr<multicast::DatagramPort> port_;
  const Faults faults_;
  std::mt19937 random_;
  multicast::DatagramVisitor* visitor_ = nullptr;
  std::vector<std::vector<std::byte>> held_;
};

std::unique_ptr<multicast::DatagramPort> open_test_port(const multicast::Group& group, multicast::Role role);

std::unique_ptr<multicast::MulticastReceiver> open_receiver(const multicast::Group& group, uint16_t member,
                                                            CheckingSink& sink,
                                                            const LossyPort::Faults& faults = {});

std::unique_ptr<multicast::MulticastSender> open_sender(const multicast::Group& group, const SentFiles& files,
                                                        uint64_t bandwidth_bytes_per_s = 0);

bool reaches(const multicast::MulticastReceiver& receiver, multicast::ReceiverState state);
bool reaches(const multicast::MulticastSender& sender, multicast::SenderState state);

}  // namespace vmigrate::test
