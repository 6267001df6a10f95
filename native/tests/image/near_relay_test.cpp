// Tests hosts that read an image from one another over tcp, while all of them fill.

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "tests/image/near_hosts.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::eventually;
using test::Gates;
using test::Host;
using test::kPage;
using transport::Operation;
using wire::ImageCounter;
using wire::InjectPoint;

class NearRelay : public test::HostsTest {};

TEST_F(NearRelay, IsReadWhileItFills) {
  Host &relay = host(0), &leaf = host(1);
  relay.start();
  leaf.start();
  relay.serve();
  leaf.read_from(relay);
  // The relay's pages come in two parts.
  std::atomic<bool> is_open{false};
  relay.bulk->hold_if(
      [&](const Operation& op) { return !is_open && op.remote_offset_bytes >= kPages / 2 * kPage; });
  ASSERT_TRUE(leaf.fetch->sweep().ok());
  ASSERT_TRUE(relay.fetch->sweep().ok());
  ASSERT_TRUE(eventually([&] { return leaf.from_near() >= kDataPages / 4 * kPage; }));
  EXPECT_NE(relay.fetch->state(), ImageState::kComplete);
  is_open = true;
  relay.bulk->release_all();
  leaf.is_right();
  relay.is_right();
  EXPECT_EQ(leaf.from_root(), 0u);
  EXPECT_EQ(leaf.from_near(), kDataPages * kPage);
}

/// Each has half of the pages, and brings the other half to the other one. The root sends nothing.
TEST_F(NearRelay, SiblingsCompleteEachOther) {
  Host &one = host(0), &other = host(1);
  one.have([](uint64_t page) { return page / 16 % 2 == 0; });
  other.have([](uint64_t page) { return page / 16 % 2 == 1; });
  for (Host* each : {&one, &other}) {
    each->start(/*resume=*/true);
    each->serve();
  }
  one.read_from(other);
  other.read_from(one);
  for (Host* each : {&one, &other}) ASSERT_TRUE(each->fetch->sweep().ok());
  for (Host* each : {&one, &other}) {
    each->is_right();
    EXPECT_EQ(each->from_root(), 0u);
    EXPECT_EQ(each->from_near(), kDataPages / 2 * kPage);
  }
}

TEST_F(NearRelay, DemandIsServedByTheRelayOrTheRoot) {
  Host &relay = host(0), &leaf = host(1);
  relay.have([](uint64_t page) { return page < kPages / 2; });
  relay.start(/*resume=*/true);
  relay.serve();
  leaf.start();
  leaf.read_from(relay);
  auto& clone = leaf.add_clone();
  for (uint64_t page = 0; page < kPages; page += 16) EXPECT_EQ(*clone.word(0, page), root.expected(page));
  EXPECT_EQ(leaf.from_near(), kPages / 32 * kPage);
  EXPECT_EQ(leaf.from_root(), kPages / 32 * kPage);
  EXPECT_EQ(leaf.counter(ImageCounter::kAbsentAnswers), kPages / 32);
  EXPECT_EQ(relay.fetch->state(), ImageState::kCopying) << "a READ of another host claims nothing";
}

/// The session ends at any moment: while it is asked, and while it answers.
TEST_F(NearRelay, ARelayThatIsLostMidway) {
  Host &relay = host(0), &leaf = host(1);
  relay.have([](uint64_t) { return true; });
  relay.start(/*resume=*/true);
  std::mt19937_64 random(1);
  for (int round = 0; round < 12; ++round) {
    hosts[1] = std::make_unique<Host>(root, *listener, *test::provider_named("tcp"),
                                      100 + static_cast<uint32_t>(round));
    Host& fresh = host(1);
    fresh.start();
    relay.serve();
    fresh.read_from(relay);
    auto& clone = fresh.add_clone();
    std::thread reader([&, seed = random()] {
      std::mt19937_64 pages(seed);
      for (int i = 0; i < 200; ++i) {
        const uint64_t page = pages() % kPages;
        EXPECT_EQ(*clone.word(0, page), root.expected(page));
      }
    });
    ASSERT_TRUE(fresh.fetch->sweep().ok());
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 4000));
    relay.session.reset();
    reader.join();
    fresh.is_right();
  }
  (void)leaf;
}

TEST_F(NearRelay, ChainsOfThreeThatFillInAnyOrder) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    std::mt19937_64 random(seed);
    hosts.clear();
    for (uint32_t id = 0; id < 3; ++id) {
      hosts.push_back(std::make_unique<Host>(root, *listener, *test::provider_named("tcp"),
                                             10 * static_cast<uint32_t>(seed) + id));
      const uint64_t share = random() % 4;
      std::vector<uint64_t> draws(kPages);
      for (auto& draw : draws) draw = random() % 4;
      host(id).have([&](uint64_t page) { return draws[page] < share; });
      host(id).start(/*resume=*/true);
      host(id).serve();
    }
    host(1).read_from(host(0));
    host(2).read_from(host(1));
    host(2).read_from(host(0), 1);
    std::vector<std::thread> vcpus;
    for (auto& each : hosts) {
      auto& clone = each->add_clone();
      vcpus.emplace_back([&, begin = random()] {
        std::mt19937_64 pages(begin);
        for (int i = 0; i < 300; ++i) {
          const uint64_t page = pages() % kPages;
          EXPECT_EQ(*clone.word(0, page), root.expected(page));
        }
      });
    }
    std::vector<size_t> order{0, 1, 2};
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t index : order) {
      ASSERT_TRUE(host(index).fetch->sweep().ok());
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    }
    for (auto& vcpu : vcpus) vcpu.join();
    for (auto& each : hosts) each->is_right();
  }
}

TEST_F(NearRelay, ARestartedReaderGoesOn) {
  Host &relay = host(0), &leaf = host(1);
  relay.have([](uint64_t) { return true; });
  relay.start(/*resume=*/true);
  relay.serve();
  leaf.start();
  leaf.read_from(relay);
  {
    Gates gates;
    auto& claimed = gates.close(InjectPoint::kImageNearClaimed);
    ASSERT_TRUE(leaf.fetch->sweep().ok());
    ASSERT_TRUE(gates.wait_parked(claimed));
    auto closing = std::async(std::launch::async, [&] { leaf.fetch->close(); });
    EXPECT_EQ(closing.wait_for(50ms), std::future_status::timeout);
    gates.open(claimed);
    ASSERT_EQ(closing.wait_for(test::kPatience), std::future_status::ready);
  }
  EXPECT_FALSE(leaf.fetch->nears()[0].is_connected);
  leaf.start(/*resume=*/true);
  leaf.read_from(relay);
  ASSERT_TRUE(leaf.fetch->sweep().ok());
  leaf.is_right();
  EXPECT_EQ(leaf.from_root(), 0u);
}

/// And its readers with it, which find their next level meanwhile.
TEST_F(NearRelay, ARestartedRelayServesWhatItHad) {
  Host &relay = host(0), &leaf = host(1);
  relay.have([](uint64_t page) { return page < kPages / 2; });
  relay.start(/*resume=*/true);
  relay.serve();
  leaf.start();
  leaf.read_from(relay);
  auto& clone = leaf.add_clone();
  EXPECT_EQ(*clone.word(0, 8), root.expected(8));
  relay.session.reset();
  relay.fetch->close();
  EXPECT_EQ(*clone.word(0, 12), root.expected(12));
  EXPECT_EQ(leaf.from_root(), kPage);
  // Before it knows its data map, and before it has any connection.
  relay.open(/*resume=*/true);
  relay.serve();
  leaf.read_from(relay);
  EXPECT_EQ(*clone.word(0, 16), root.expected(16));
  EXPECT_EQ(leaf.from_near(), 2 * kPage);
}

}  // namespace
}  // namespace vmigrate::pager
