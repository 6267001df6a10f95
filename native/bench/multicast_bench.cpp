// Measures a multicast, sender and receivers in one process, and what the tag of a datagram costs. Prints one
// line of JSON for each way. By default it goes over the loopback interface by UDP; with the addresses of two
// RDMA ports, of the sender and of the receivers, by RDMA, as many times as asked for.
//
// multicast_bench [MIB [RECEIVERS [ADDRESS ADDRESS [ROUNDS]]]]        default: 256 1

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/thread_util.hpp"
#include "memory/region.hpp"
#include "multicast/datagram/writer.hpp"
#include "multicast/receiver.hpp"
#include "multicast/sender.hpp"

namespace {

using namespace vmigrate;
using multicast::ReceiverState;
using multicast::SenderState;
using pager::now_ns;

constexpr uint64_t kPage = 4096;

[[noreturn]] void die(const Error& error) {
  std::fprintf(stderr, "multicast_bench: %s: %s\n", error.what, std::strerror(error.system_errno));
  std::exit(1);
}
void must(const Status& status) {
  if (!status) die(status.error());
}
template <typename T>
T must(Result<T> result) {
  if (!result) die(result.error());
  return std::move(result).value();
}

/// Writes the pages to a file, as an image does.
class FileSink final : public multicast::PageSink {
 public:
  FileSink(const std::string& path, uint64_t length_bytes) : here_(length_bytes / kPage) {
    must(memory::Region::create_file(path, length_bytes, kPage));
    fd_.reset(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  }
  uint64_t page_count(uint32_t region) const override { return region == 0 ? here_.size() : 0; }
  bool wants(uint32_t, PageIndex page) const override { return !here_[raw(page)]; }
  void take(uint32_t, PageIndex page, std::span<const std::byte> bytes) override {
    if (::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(raw(page) * kPage)) > 0) ++pages;
    here_[raw(page)] = true;
  }
  size_t wanted(std::span<uint64_t>) override { return 0; }
  bool must_end() const override { return false; }
  uint64_t pages = 0;

 private:
  UniqueFd fd_;
  std::vector<bool> here_;
};

/// How a multicast goes.
struct Way {
  const char* provider = "udp";
  std::string sender_address = "127.0.0.1", receiver_address = "127.0.0.1";
  uint32_t mtu_bytes = 0;
  bool merges = true;
};

multicast::Group random_group(const Way& way) {
  std::random_device random;
  multicast::Group group;
  group.provider = way.provider;
  group.address = "239.77." + std::to_string(random() % 256) + "." + std::to_string(1 + random() % 250);
  group.port = static_cast<uint16_t>(20'000 + random() % 12'000);
  group.interface_address = way.receiver_address;
  for (uint8_t& byte : group.key) byte = static_cast<uint8_t>(random());
  group.session = random();
  group.mtu_bytes = way.mtu_bytes;
  group.merges_received = way.merges;
  return group;
}

void measure_tags(size_t payload_bytes) {
  multicast::Key key{};
  const auto auth = must(multicast::DatagramAuth::create(key));
  multicast::DatagramWriter writer(*auth, 1, multicast::kSenderMember, 1);
  std::vector<std::byte> datagram(sizeof(multicast::DatagramHeader) + payload_bytes, std::byte{7});
  constexpr int kRoundsMax = 100'000;
  constexpr uint64_t kSpentNsMax = 1'000'000'000;
  const uint64_t since_ns = pager::thread_cpu_ns();
  int rounds = 0;
  while (rounds < kRoundsMax && (rounds % 100 != 0 || pager::thread_cpu_ns() - since_ns < kSpentNsMax)) {
    if (!writer.finish(datagram, multicast::DatagramKind::kData)) std::exit(1);
    ++rounds;
  }
  const auto spent_ns = static_cast<double>(pager::thread_cpu_ns() - since_ns);
  std::printf("{\"measured\":\"tag\",\"payloadBytes\":%zu,\"nsPerDatagram\":%.0f}\n", payload_bytes,
              spent_ns / rounds);
}

void measure(const std::string& dir, uint64_t length_bytes, uint16_t receiver_count, const Way& way) {
  multicast::Group group = random_group(way);
  std::vector<std::unique_ptr<FileSink>> sinks;
  std::vector<std::unique_ptr<multicast::MulticastReceiver>> receivers;
  for (uint16_t member = 1; member <= receiver_count; ++member) {
    const std::string path = dir + "/image" + std::to_string(member);
    std::filesystem::remove(path);
    sinks.push_back(std::make_unique<FileSink>(path, length_bytes));
    multicast::ReceiverConfig config;
    config.group = group;
    config.member = member;
    config.sink = sinks.back().get();
    receivers.push_back(must(multicast::MulticastReceiver::open(std::move(config))));
  }
  multicast::SenderConfig config;
  config.image.push_back({dir + "/root", length_bytes, kPage});
  group.interface_address = way.sender_address;
  config.group = group;
  const auto sender = must(multicast::MulticastSender::open(std::move(config)));
  const uint64_t since_ns = now_ns();
  must(sender->start());
  while (sender->counters().sent_pages < length_bytes / kPage && sender->state() == SenderState::kSending)
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  const uint64_t sent_ns = now_ns() - since_ns;
  while (sender->state() == SenderState::kSending) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  uint64_t pages = 0, lost = 0, cpu_ns = 0;
  for (size_t i = 0; i < receivers.size(); ++i) {
    receivers[i]->close();
    pages += sinks[i]->pages;
    lost += receivers[i]->counters().lost_datagrams;
    cpu_ns += receivers[i]->counters().cpu_ns;
  }
  const auto counters = sender->counters();
  std::printf(
      "{\"measured\":\"%s\",\"mtuBytes\":%u,\"merges\":%s,\"receivers\":%u,\"sentMbPerS\":%.1f,"
      "\"datagramBytes\":%.0f,"
      "\"senderCpuS\":%.2f,\"receiverCpuS\":%.2f,\"lostPercent\":%.2f,\"missingPagesPercent\":%.2f}\n",
      way.provider, way.mtu_bytes, way.merges ? "true" : "false", receiver_count,
      static_cast<double>(counters.sent_bytes) * 1e3 / static_cast<double>(sent_ns),
      static_cast<double>(counters.sent_bytes) / static_cast<double>(counters.sent_datagrams),
      static_cast<double>(counters.cpu_ns) / 1e9, static_cast<double>(cpu_ns) / 1e9 / receiver_count,
      100.0 * static_cast<double>(lost) / static_cast<double>(counters.sent_datagrams * receiver_count),
      100.0 -
          100.0 * static_cast<double>(pages) / static_cast<double>(length_bytes / kPage * receiver_count));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t length_bytes = (argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 256) << 20;
  const auto receivers = static_cast<uint16_t>(argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 1);
  for (const size_t payload_bytes : {1408u, 2048u, 4096u}) measure_tags(payload_bytes);
  char name[] = "/dev/shm/vmigrate-bench-XXXXXX";
  if (::mkdtemp(name) == nullptr) die(system_error("mkdtemp"));
  const std::string dir = name;
  must(memory::Region::create_file(dir + "/root", length_bytes, kPage));
  {
    auto root = must(memory::Region::open(dir + "/root", length_bytes, kPage, memory::Mode::kReadWrite));
    for (uint64_t at = 0; at < length_bytes; at += 8) {
      const uint64_t word = at * 0x9e3779b97f4a7c15ull | 1;
      std::memcpy(root->base() + at, &word, 8);
    }
  }
  if (argc > 4) {
    const int rounds = argc > 5 ? std::atoi(argv[5]) : 1;
    for (int i = 0; i < rounds; ++i) measure(dir, length_bytes, receivers, {"verbs", argv[3], argv[4]});
  } else {
    for (const uint32_t mtu_bytes : {9000u, 1500u}) {
      for (const bool merges : {true, false})
        measure(dir, length_bytes, receivers, {.mtu_bytes = mtu_bytes, .merges = merges});
    }
  }
  std::error_code ignored;
  std::filesystem::remove_all(dir, ignored);
  return 0;
}
