#include "tests/multicast/harness.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <utility>

#include "memory/region.hpp"

namespace vmigrate::test {

multicast::Group random_group(uint32_t mtu_bytes) {
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

SentFiles::SentFiles(const Specs& specs) {
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
SentFiles::~SentFiles() = default;

CheckingSink::CheckingSink(const SentFiles& files) {
  for (const auto& pages : files.data) came_.emplace_back(pages.size(), false);
}
CheckingSink::~CheckingSink() = default;

void CheckingSink::take(uint32_t region, PageIndex page, std::span<const std::byte> bytes) {
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
size_t CheckingSink::wanted(std::span<uint64_t> out) {
  const std::lock_guard lock(mutex_);
  size_t count = 0;
  for (; count < out.size() && !wants_.empty(); wants_.pop_front()) out[count++] = wants_.front();
  return count;
}
void CheckingSink::want(uint64_t wanted) {
  const std::lock_guard lock(mutex_);
  wants_.push_back(wanted);
}
size_t CheckingSink::count() const {
  const std::lock_guard lock(mutex_);
  return order.size();
}
bool CheckingSink::came(uint32_t region, uint64_t page) const {
  const std::lock_guard lock(mutex_);
  return came_[region][page];
}

LossyPort::LossyPort(std::unique_ptr<multicast::DatagramPort> port, Faults faults, uint32_t seed)
    : port_(std::move(port)), faults_(std::move(faults)), random_(seed) {}
LossyPort::~LossyPort() = default;

Status LossyPort::send(std::span<const std::byte> bytes, size_t datagram_bytes) {
  return port_->send(bytes, datagram_bytes);
}
Result<size_t> LossyPort::receive(multicast::DatagramVisitor& visitor) {
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
void LossyPort::answer(std::span<const std::byte> datagram) {
  if (!happens(faults_.report_loss)) port_->answer(datagram);
}

bool LossyPort::happens(double chance) {
  return std::uniform_real_distribution<>(0, 1)(random_) < chance;
}
void LossyPort::on_datagram(std::span<const std::byte> datagram) {
  if (happens(faults_.loss) || (faults_.loses && faults_.loses(datagram))) return;
  if (happens(faults_.repeat)) visitor_->on_datagram(datagram);
  if (faults_.reorder == 0) return visitor_->on_datagram(datagram);
  held_.emplace_back(datagram.begin(), datagram.end());
  if (held_.size() <= faults_.reorder) return;
  const auto chosen = held_.begin() + static_cast<std::ptrdiff_t>(random_() % held_.size());
  visitor_->on_datagram(*chosen);
  held_.erase(chosen);
}

std::unique_ptr<multicast::DatagramPort> open_test_port(const multicast::Group& group, multicast::Role role) {
  auto port = multicast::open_port(group, role);
  EXPECT_TRUE(port.ok()) << port.error().what << ": " << strerror(port.error().system_errno);
  return std::move(port).value();
}

std::unique_ptr<multicast::MulticastReceiver> open_receiver(const multicast::Group& group, uint16_t member,
                                                            CheckingSink& sink,
                                                            const LossyPort::Faults& faults) {
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

std::unique_ptr<multicast::MulticastSender> open_sender(const multicast::Group& group, const SentFiles& files,
                                                        uint64_t bandwidth_bytes_per_s) {
  multicast::SenderConfig config;
  config.image = files.files;
  config.group = group;
  config.bandwidth_bytes_per_s = bandwidth_bytes_per_s;
  auto sender = multicast::MulticastSender::open(std::move(config));
  EXPECT_TRUE(sender.ok()) << sender.error().what << ": " << strerror(sender.error().system_errno);
  return std::move(sender).value();
}

bool reaches(const multicast::MulticastReceiver& receiver, multicast::ReceiverState state) {
  return eventually([&] { return receiver.state() == state; });
}
bool reaches(const multicast::MulticastSender& sender, multicast::SenderState state) {
  return eventually([&] { return sender.state() == state; });
}

}  // namespace vmigrate::test
