// Tests what others can do to a group: those who do not know its key, and members that do.

#include <gtest/gtest.h>

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstring>
#include <thread>

#include "multicast/datagram/limits.hpp"
#include "multicast/datagram/writer.hpp"
#include "tests/multicast/harness.hpp"

namespace vmigrate::multicast {
namespace {

using test::CheckingSink;
using test::eventually;
using test::kPage;
using test::open_receiver;
using test::open_sender;
using test::open_test_port;
using test::random_group;
using test::reaches;
using test::SentFiles;

/// Sends what it likes to a group.
class Forger {
 public:
  explicit Forger(const Group& group, uint16_t member = kSenderMember)
      : port_(open_test_port(group, Role::kSender)),
        auth_(std::move(DatagramAuth::create(group.key)).value()),
        writer_(*auth_, group.session, member, 1) {}

  std::vector<std::byte> data(uint32_t region, uint64_t offset_bytes, size_t length_bytes) {
    std::vector<std::byte> datagram(sizeof(DatagramHeader) + length_bytes, std::byte{0xee});
    EXPECT_TRUE(writer_.finish(datagram, DatagramKind::kData, static_cast<uint16_t>(region), offset_bytes));
    return datagram;
  }
  /// A page as the files have it.
  std::vector<std::byte> good_page(uint64_t page) {
    std::vector<std::byte> datagram(sizeof(DatagramHeader) + kPage);
    for (uint64_t i = 0; i < kPage / 8; ++i) {
      const uint64_t word = test::pattern_word(1, page, i);
      std::memcpy(datagram.data() + sizeof(DatagramHeader) + i * 8, &word, 8);
    }
    EXPECT_TRUE(writer_.finish(datagram, DatagramKind::kData, 0, page * kPage));
    return datagram;
  }
  std::vector<std::byte> end() {
    std::vector<std::byte> datagram(sizeof(DatagramHeader) + sizeof(wire::MulticastEnd));
    EXPECT_TRUE(writer_.finish(datagram, DatagramKind::kEnd));
    return datagram;
  }
  void send(std::span<const std::byte> datagram) { EXPECT_TRUE(port_->send(datagram, datagram.size()).ok()); }
  DatagramPort& port() { return *port_; }

 private:
  std::unique_ptr<DatagramPort> port_;
  std::unique_ptr<DatagramAuth> auth_;
  DatagramWriter writer_;
};

/// Each kind of datagram that must be dropped is sent, and counted; then a good one, which shows that the
/// receiver has got that far.
class Hostile : public testing::Test {
 protected:
  void expect_rejected(Forger& forger, const std::vector<std::byte>& datagram, const char* what) {
    const uint64_t before = receiver_->counters().rejected_datagrams;
    const size_t count = sink_.count();
    // The loopback may lose it on a loaded machine.
    ASSERT_TRUE(eventually([&] {
      forger.send(datagram);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      return receiver_->counters().rejected_datagrams > before;
    })) << what;
    EXPECT_EQ(sink_.count(), count) << what;
  }
  void expect_alive() {
    const uint64_t page = next_page_++;
    ASSERT_TRUE(eventually([&] {
      genuine_.send(genuine_.good_page(page));
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      return sink_.came(0, page);
    }));
    EXPECT_EQ(sink_.bad_pages, 0u);
  }

  const Group group_ = random_group(9000);
  SentFiles files_{SentFiles::Specs{{64}}};
  CheckingSink sink_{files_};
  std::unique_ptr<MulticastReceiver> receiver_ = open_receiver(group_, 1, sink_);
  Forger genuine_{group_};
  uint64_t next_page_ = 0;
};

TEST_F(Hostile, WhoeverDoesNotKnowTheKeyIsNotHeard) {
  Group other = group_;
  other.key[5] ^= 4;
  Forger stranger(other);
  expect_rejected(stranger, stranger.good_page(1), "another key");
  expect_rejected(stranger, stranger.end(), "an end mark with another key");
  expect_alive();
  EXPECT_NE(receiver_->state(), ReceiverState::kEnded);
  other = group_;
  other.session += 1;
  Forger old(other);
  expect_rejected(old, old.good_page(1), "the same key in another session");
  auto changed = genuine_.good_page(5);
  changed.back() ^= std::byte{1};
  expect_rejected(stranger, changed, "a changed byte");
  changed = genuine_.good_page(5);
  changed[offsetof(DatagramHeader, offset)] ^= std::byte{64};
  expect_rejected(stranger, changed, "another place");
  expect_alive();
}

TEST_F(Hostile, NoiseIsDropped) {
  expect_alive();
  std::mt19937 random(3);
  for (const size_t length : {0u, 1u, 47u, 48u, 49u, 112u, 4143u, 4145u, 8000u}) {
    std::vector<std::byte> noise(length);
    for (auto& byte : noise) byte = static_cast<std::byte>(random());
    if (length > 0) noise[0] = std::byte{wire::kDatagramMagic};
    if (length > 0) expect_rejected(genuine_, noise, "noise");
  }
  auto cut = genuine_.good_page(9);
  cut.resize(cut.size() - 64);
  expect_rejected(genuine_, cut, "a truncated datagram");
  auto longer = genuine_.good_page(9);
  longer.resize(longer.size() + 64);
  expect_rejected(genuine_, longer, "a longer one than it says");
  expect_alive();
}

TEST_F(Hostile, AMemberCannotWriteWhereNoPageIs) {
  expect_alive();
  expect_rejected(genuine_, genuine_.data(1, 0, kPage), "no such region");
  expect_rejected(genuine_, genuine_.data(0xffff, 0, kPage), "no such region");
  expect_rejected(genuine_, genuine_.data(0, 64 * kPage, kPage), "behind the end");
  expect_rejected(genuine_, genuine_.data(0, ~uint64_t{0} - kPage + 1, kPage), "far behind the end");
  expect_rejected(genuine_, genuine_.data(0, 63 * kPage + 64, kPage), "over the end");
  expect_rejected(genuine_, genuine_.data(0, 32, 64), "not in grains");
  expect_rejected(genuine_, genuine_.data(0, 0, 100), "not whole grains");
  expect_rejected(genuine_, genuine_.data(0, 0, 8192), "more than a page");
  expect_rejected(genuine_, genuine_.data(0, 0, 0), "nothing");
  expect_alive();
}

TEST_F(Hostile, AnotherMemberIsNotTheSender) {
  expect_alive();
  Forger sister(group_, 2);
  expect_rejected(sister, sister.good_page(30), "data from a receiver");
  expect_rejected(sister, sister.end(), "an end mark from a receiver");
  expect_alive();
}

TEST_F(Hostile, WhatIsRepeatedChangesNothing) {
  expect_alive();
  const auto page = genuine_.good_page(40);
  const auto is_counted = [&] { return receiver_->counters().repeated_datagrams > 20; };
  ASSERT_TRUE(eventually([&] {
    genuine_.send(page);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return is_counted();
  }));
  EXPECT_TRUE(sink_.came(0, 40));
  expect_alive();
  // The end of another session of this group, recorded and sent again.
  Group old = group_;
  old.session -= 1;
  Forger replayed(old);
  expect_rejected(replayed, replayed.end(), "an old end mark");
  EXPECT_NE(receiver_->state(), ReceiverState::kEnded);
}

/// What a sender is told by members that lie, and by strangers.
TEST(HostileReports, DoNotStopASender) {
  const Group group = random_group(9000);
  SentFiles files(SentFiles::Specs{{12'000}});
  CheckingSink sink(files);
  const auto receiver = open_receiver(group, 1, sink);
  const auto sender = open_sender(group, files, 20'000'000);

  // A member that has joined, and answers with nonsense.
  class Liar final : public DatagramVisitor {
   public:
    explicit Liar(const Group& group)
        : port(open_test_port(group, Role::kReceiver)),
          auth_(std::move(DatagramAuth::create(group.key)).value()) {
      Group other = group;
      other.key[0] ^= 1;
      other_auth_ = std::move(DatagramAuth::create(other.key)).value();
      writers_.emplace_back(*auth_, group.session, 2, 1);
      writers_.emplace_back(*auth_, group.session, kSenderMember, uint64_t{1} << 40);
      writers_.emplace_back(*auth_, group.session + 1, 3, 1);
      writers_.emplace_back(*other_auth_, group.session, 4, 1);
    }
    void on_datagram(std::span<const std::byte>) override {
      port->adopt_source();
      if (++seen_ % 20 != 0) return;
      for (DatagramWriter& writer : writers_) {
        wire::MulticastReport report{};
        report.clock_ns = random_();
        report.highest_sequence = random_() % 3 == 0 ? random_() : random_() % 5000;
        report.received_datagrams = random_() % 4000;
        report.received_bytes = random_();
        report.wanted_count = static_cast<uint32_t>(random_() % 20);
        for (uint8_t& byte : report.wanted) byte = static_cast<uint8_t>(random_());
        std::array<std::byte, sizeof(DatagramHeader) + sizeof(report)> bytes;
        port->answer(writer.write(bytes, DatagramKind::kReport, report));
        port->answer(std::span(bytes).first(random_() % bytes.size()));
      }
    }
    std::unique_ptr<DatagramPort> port;

   private:
    std::unique_ptr<DatagramAuth> auth_, other_auth_;
    std::vector<DatagramWriter> writers_;
    std::mt19937_64 random_{5};
    uint64_t seen_ = 0;
  } liar(group);
  std::atomic<bool> is_over{false};
  std::thread lying([&] {
    while (!is_over) {
      const auto count = liar.port->receive(liar);
      if (!count.ok() || count.value() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  ASSERT_TRUE(sender->start().ok());
  EXPECT_TRUE(reaches(*sender, SenderState::kEnded));
  is_over = true;
  lying.join();
  EXPECT_TRUE(reaches(*receiver, ReceiverState::kEnded));
  EXPECT_EQ(sink.bad_pages, 0u);
  EXPECT_EQ(sender->counters().sent_pages, files.data_pages);
  for (const MemberStatistics& one : sender->members()) EXPECT_LE(one.member, 2) << "others are not members";
}

}  // namespace
}  // namespace vmigrate::multicast
