// Tests a sender and its receivers over real multicast on the loopback interface.

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sched.h>

#include <cstring>
#include <thread>

#include "multicast/datagram/limits.hpp"
#include "multicast/probe.hpp"
#include "tests/multicast/harness.hpp"

namespace vmigrate::multicast {
namespace {

using namespace std::chrono_literals;
using test::CheckingSink;
using test::eventually;
using test::kPage;
using test::LossyPort;
using test::open_receiver;
using test::open_sender;
using test::random_group;
using test::reaches;
using test::SentFiles;

bool all_but_each_fourth(uint64_t page) {
  return page % 4 != 3;
}

/// Both ways to put a page into datagrams, with and without the kernel's merging.
class Multicast : public testing::TestWithParam<std::pair<uint32_t, bool>> {
 protected:
  static Group group() {
    Group group = random_group(GetParam().first);
    group.merges_received = GetParam().second;
    return group;
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, Multicast,
                         testing::Values(std::pair(9000u, true), std::pair(1500u, true),
                                         std::pair(1500u, false), std::pair(0u, false)));

TEST_P(Multicast, BringsEveryPageWithDataToAllReceivers) {
  const Group group = this->group();
  SentFiles files(SentFiles::Specs{{3000, all_but_each_fourth}, {64}});
  std::vector<std::unique_ptr<CheckingSink>> sinks;
  std::vector<std::unique_ptr<MulticastReceiver>> receivers;
  for (uint16_t member = 1; member <= 3; ++member) {
    sinks.push_back(std::make_unique<CheckingSink>(files));
    receivers.push_back(open_receiver(group, member, *sinks.back()));
    EXPECT_EQ(receivers.back()->state(), ReceiverState::kWaiting);
  }
  const auto sender = open_sender(group, files, 40'000'000);
  EXPECT_EQ(sender->state(), SenderState::kWaiting);
  ASSERT_TRUE(sender->start().ok());
  EXPECT_FALSE(sender->start().ok());
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
  uint64_t sum = 0;
  for (size_t i = 0; i < receivers.size(); ++i) {
    ASSERT_TRUE(reaches(*receivers[i], ReceiverState::kEnded));
    ASSERT_TRUE(eventually([&] { return receivers[i]->has_ended(); }));
    const ReceiverCounters got = receivers[i]->counters();
    EXPECT_EQ(sinks[i]->bad_pages, 0u);
    EXPECT_EQ(got.sent_pages, files.data_pages);
    EXPECT_EQ(got.rejected_datagrams, 0u);
    EXPECT_TRUE(got.lost_datagrams != 0 || sinks[i]->count() == files.data_pages);
    sum += sinks[i]->count();
    for (uint32_t region = 0; region < 2; ++region)
      for (uint64_t page = 0; page < files.data[region].size(); ++page)
        EXPECT_TRUE(files.data[region][page] || !sinks[i]->came(region, page)) << "a hole was sent";
  }
  EXPECT_GT(sum, files.data_pages * 3 / 2) << "a machine that loses half of the loopback's packets";
  const SenderCounters sent = sender->counters();
  EXPECT_EQ(sent.sent_pages, files.data_pages);
  EXPECT_EQ(sent.pages_total, files.data_pages);
  EXPECT_GE(sent.sent_bytes, files.data_pages * kPage);
  EXPECT_LT(sent.sent_bytes, files.data_pages * kPage * 11 / 10);
  const auto members = sender->members();
  ASSERT_EQ(members.size(), 3u);
  for (const MemberStatistics& one : members) EXPECT_GT(one.received_bytes, files.data_pages * kPage / 3);
  sender->close();
  EXPECT_EQ(sender->state(), SenderState::kEnded);
}

TEST_P(Multicast, EveryPageThatComesIsRightWhateverTheNetworkDoes) {
  const Group group = this->group();
  SentFiles files(SentFiles::Specs{{2000}});
  const LossyPort::Faults kinds[] = {{.loss = 0.1},
                                     {.repeat = 0.3},
                                     {.reorder = 40},
                                     {.loss = 0.05, .repeat = 0.1, .reorder = 10, .report_loss = 0.5}};
  std::vector<std::unique_ptr<CheckingSink>> sinks;
  std::vector<std::unique_ptr<MulticastReceiver>> receivers;
  for (uint16_t member = 1; member <= 4; ++member) {
    sinks.push_back(std::make_unique<CheckingSink>(files));
    receivers.push_back(open_receiver(group, member, *sinks.back(), kinds[member - 1]));
  }
  const auto sender = open_sender(group, files, 30'000'000);
  ASSERT_TRUE(sender->start().ok());
  for (size_t i = 0; i < receivers.size(); ++i) {
    ASSERT_TRUE(reaches(*receivers[i], ReceiverState::kEnded)) << i;
    EXPECT_EQ(sinks[i]->bad_pages, 0u) << i;
    EXPECT_GT(sinks[i]->count(), files.data_pages / 4) << i;
    EXPECT_EQ(receivers[i]->counters().rejected_datagrams, 0u) << i;
  }
  EXPECT_LT(sinks[0]->count(), files.data_pages);
  EXPECT_GT(receivers[0]->counters().lost_datagrams, 50u);
  EXPECT_GT(receivers[1]->counters().repeated_datagrams, 100u);
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
}

TEST(MulticastLoopback, WantedPagesGoFirst) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{8000}});
  CheckingSink sink(files);
  const auto receiver = open_receiver(group, 1, sink);
  const auto sender = open_sender(group, files, 8'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(eventually([&] { return sink.count() > 100; }));
  sink.want(7777);
  sink.want(uint64_t{5} << 48 | 3);  // no such region
  ASSERT_TRUE(eventually([&] { return sink.came(0, 7777); }));
  EXPECT_LT(sink.count(), 6000u) << "it came in its turn";
  EXPECT_FALSE(sink.came(0, 7700));
  sender->close();
  EXPECT_EQ(sender->state(), SenderState::kClosed);
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kEnded)) << "a sender that is closed says so";
  EXPECT_LT(receiver->counters().sent_pages, 8000u);
}

TEST(MulticastLoopback, AStarvedReceiverDoesNotSlowTheOthersDown) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{16'000}});
  CheckingSink first(files), second(files), starved(files);
  starved.delay_us = 20'000;
  const auto one = open_receiver(group, 1, first), two = open_receiver(group, 2, second),
             three = open_receiver(group, 3, starved);
  const auto sender = open_sender(group, files, 30'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
  ASSERT_TRUE(reaches(*one, ReceiverState::kEnded) && reaches(*two, ReceiverState::kEnded));
  // 64 MB at its 0.2 MB/s would take minutes.
  EXPECT_LT(starved.count(), 4000u);
  EXPECT_GT(first.count(), 8000u);
  three->close();
}

TEST(MulticastLoopback, WithoutReceiversItEnds) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{200'000 / 4}});
  const auto sender = open_sender(group, files, 20'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
  EXPECT_LT(sender->counters().sent_pages, files.data_pages);
  EXPECT_TRUE(sender->members().empty());
  EXPECT_FALSE(sender->failure().has_value());
}

TEST(MulticastLoopback, WhenItsReceiversHaveGoneItEnds) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{50'000}});
  CheckingSink sink(files);
  auto receiver = open_receiver(group, 1, sink);
  const auto sender = open_sender(group, files, 10'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(eventually([&] { return sink.count() > 100; }));
  sink.ends = true;  // it has all that it needs
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kEnded));
  receiver.reset();
  ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
  EXPECT_LT(sender->counters().sent_pages, files.data_pages);
}

/// As if the sender's host had died: no end mark.
TEST(MulticastLoopback, AReceiverNoticesSilenceAndThatItIsOver) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{30'000}});
  CheckingSink sink(files);
  std::atomic<bool> is_cut{false};
  LossyPort::Faults faults;
  faults.loses = [&](std::span<const std::byte>) { return is_cut.load(); };
  const auto receiver = open_receiver(group, 1, sink, faults);
  const auto sender = open_sender(group, files, 10'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(eventually([&] { return sink.count() > 100; }));
  is_cut = true;
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kSilent));
  EXPECT_EQ(sender->state(), SenderState::kSending);
  is_cut = false;
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kReceiving)) << "it may go on";
  is_cut = true;
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kSilent));
  ASSERT_TRUE(eventually([&] { return receiver->has_ended(); })) << "and is over after a while";
  EXPECT_EQ(receiver->state(), ReceiverState::kSilent);
  sender->close();
}

TEST(MulticastLoopback, ClosesInEveryState) {
  const Group group = random_group(1500);
  SentFiles files(SentFiles::Specs{{4000}});
  CheckingSink sink(files);
  {
    const auto waiting = open_receiver(group, 1, sink);
    const auto unstarted = open_sender(group, files);
    unstarted->close();
    EXPECT_EQ(unstarted->state(), SenderState::kClosed);
    EXPECT_EQ(unstarted->start().error().code, ErrorCode::kClosed);
    unstarted->close();
    waiting->close();
    EXPECT_EQ(waiting->state(), ReceiverState::kWaiting);
    EXPECT_TRUE(waiting->has_ended());
    waiting->close();
  }
  for (int i = 0; i < 10; ++i) {
    const auto receiver = open_receiver(group, static_cast<uint16_t>(10 + i), sink);
    const auto sender = open_sender(group, files, 20'000'000);
    ASSERT_TRUE(sender->start().ok());
    std::this_thread::sleep_for(std::chrono::milliseconds(i * 7));
    if (i % 2 == 0) receiver->close();
    sender->close();
    EXPECT_NE(sender->state(), SenderState::kSending);
  }
  EXPECT_EQ(sink.bad_pages, 0u);
}

TEST(MulticastLoopback, AFileThatShrinksFailsTheSender) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{20'000}});
  CheckingSink sink(files);
  const auto receiver = open_receiver(group, 1, sink);
  const auto sender = open_sender(group, files, 10'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(eventually([&] { return sink.count() > 100; }));
  ASSERT_EQ(::ftruncate(files.fds[0].get(), kPage), 0);
  ASSERT_TRUE(reaches(*sender, SenderState::kFailed));
  EXPECT_EQ(sender->failure()->code, ErrorCode::kRegionChanged);
  ASSERT_TRUE(reaches(*receiver, ReceiverState::kEnded)) << "the receivers are told";
  EXPECT_EQ(sink.bad_pages, 0u);
  sender->close();
  EXPECT_EQ(sender->state(), SenderState::kFailed);
}

TEST(MulticastLoopback, RefusesWhatItCannotDo) {
  const auto code_of = [](const Group& group, const SentFiles& files) {
    SenderConfig config;
    config.image = files.files;
    config.group = group;
    auto sender = MulticastSender::open(std::move(config));
    return sender.ok() ? std::optional<ErrorCode>() : sender.error().code;
  };
  SentFiles files(SentFiles::Specs{{16}});
  Group group = random_group();
  EXPECT_EQ(code_of(group, files), std::nullopt);
  group.provider = "pigeon";
  EXPECT_EQ(code_of(group, files), ErrorCode::kUnsupported);
  group = random_group();
  group.address = "127.0.0.1";
  EXPECT_EQ(code_of(group, files), ErrorCode::kInvalidArgument);
  group.address = "fork";
  EXPECT_EQ(code_of(group, files), ErrorCode::kInvalidArgument);
  group.address = "ff15::1234";
  EXPECT_EQ(code_of(group, files), ErrorCode::kInvalidArgument) << "interface of another IP version";
  group = random_group();
  group.interface_address = "192.0.2.7";
  EXPECT_EQ(code_of(group, files), ErrorCode::kNotFound);
  group = random_group(100);
  EXPECT_EQ(code_of(group, files), ErrorCode::kInvalidArgument) << "MTU";
  SentFiles huge(SentFiles::Specs{{1024}});
  huge.files[0].page_bytes = 2 << 20;
  EXPECT_EQ(code_of(random_group(), huge), ErrorCode::kUnsupported);
  SentFiles cut(SentFiles::Specs{{16}});
  cut.files[0].length_bytes += kPage;
  EXPECT_EQ(code_of(random_group(), cut), ErrorCode::kRegionChanged);
}

/// Runs it in a network of its own, which has one pair of interfaces: the loopback has no route for IPv6
/// groups. Threads that it starts are in that network too.
template <typename Run>
void in_own_network(Run run) {
  std::thread([&run] {
    ASSERT_EQ(::unshare(CLONE_NEWNET), 0) << strerror(errno);
    for (const char* command :
         {"ip link set lo up", "ip link add m0 mtu 9000 type veth peer name m1 mtu 9000", "ip link set m0 up",
          "ip link set m1 up", "ip -6 address add fd00::1/64 dev m0 nodad",
          "ip address add 10.1.1.1/24 dev m0"})
      ASSERT_EQ(std::system(command), 0) << command;
    run();
  }).join();
}

TEST(MulticastNetwork, WorksOverEitherIpVersion) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  for (const auto& [address, own] : {std::pair("ff15::77:1", "fd00::1"), std::pair("ff12::77:1", "fd00::1"),
                                     std::pair("239.1.2.3", "10.1.1.1"), std::pair("239.1.2.3", "")}) {
    Group group = random_group();
    group.address = address;
    group.interface_address = own;
    in_own_network([&] {
      // Without an address of the interface the route decides.
      const bool is_routed = group.interface_address.empty();
      ASSERT_TRUE(!is_routed || std::system("ip route add 239.0.0.0/8 dev m0") == 0);
      SentFiles files(SentFiles::Specs{{500}});
      CheckingSink sink(files);
      const auto receiver = open_receiver(group, 1, sink);
      const auto sender = open_sender(group, files, 20'000'000);
      ASSERT_TRUE(sender->start().ok());
      ASSERT_TRUE(reaches(*receiver, ReceiverState::kEnded)) << group.address;
      EXPECT_GT(sink.count(), 250u);
      EXPECT_EQ(sink.bad_pages, 0u);
      ASSERT_TRUE(reaches(*sender, SenderState::kEnded));
      EXPECT_EQ(sender->members().size(), 1u) << "reports arrive";
    });
    if (HasFatalFailure()) return;
  }
}

TEST(MulticastProbe, FindsTheLargestPacketThatPasses) {
  const Group group = random_group(9000);
  auto receiving = std::async(std::launch::async, [&] { return receive_probes(group, 20'000ms); });
  while (receiving.wait_for(0ms) != std::future_status::ready) ASSERT_TRUE(send_probes(group, 50ms).ok());
  const auto largest = receiving.get();
  ASSERT_TRUE(largest.ok());
  EXPECT_EQ(largest.value(), 9000u);
}

TEST(MulticastProbe, OthersDoNotCount) {
  const Group group = random_group(9000);
  Group other_key = group, other_session = group;
  other_key.key[0] ^= 1;
  other_session.session ^= 1;
  auto receiving = std::async(std::launch::async, [&] { return receive_probes(group, 500ms); });
  while (receiving.wait_for(0ms) != std::future_status::ready) {
    ASSERT_TRUE(send_probes(other_key, 20ms).ok());
    ASSERT_TRUE(send_probes(other_session, 20ms).ok());
  }
  EXPECT_EQ(receiving.get().value(), 0u);
}

}  // namespace
}  // namespace vmigrate::multicast
