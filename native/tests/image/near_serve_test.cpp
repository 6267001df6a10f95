// Tests what a host answers that holds a part of an image.

#include <gtest/gtest.h>

#include <thread>

#include "tests/image/near_hosts.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::eventually;
using test::FetchHarness;
using test::Gates;
using test::Host;
using test::kPage;
using transport::Channel;
using transport::OpResult;
using wire::ImageCounter;
using wire::InjectPoint;
using wire::PageState;

/// What one connection to a partial holder is answered.
class PartialHolder : public test::HostsTest {
 protected:
  void connect() {
    endpoint = host(0).connect(Channel::kDemand);
    memory = std::make_unique<transport::TestMemory>(1 << 20);
    local =
        endpoint->register_local({.base = memory->base(), .length_bytes = memory->length_bytes()}).value();
  }
  OpResult read(uint64_t page, uint64_t count = 1) {
    std::memset(memory->base(), 0x5a, memory->length_bytes());
    return transport::run_one(*endpoint, {.tag = 1,
                                          .local = local,
                                          .remote = host(0).session->keys()[0].ram,
                                          .remote_offset_bytes = page * kPage,
                                          .length_bytes = static_cast<uint32_t>(count * kPage)});
  }
  bool has_pages(uint64_t page, uint64_t count = 1) {
    for (uint64_t i = 0; i < count; ++i) {
      uint64_t word = 0;
      std::memcpy(&word, memory->base() + i * kPage + kPage - 8, 8);
      if (word != (has_data(page + i) ? test::pattern_word(1, page + i, 511) : 0)) return false;
    }
    return true;
  }

  std::unique_ptr<transport::Endpoint> endpoint;
  std::unique_ptr<transport::TestMemory> memory;
  transport::LocalId local{};
};

TEST_F(PartialHolder, AnswersWithWhatIsHere) {
  host(0).have([](uint64_t page) { return page < 100 || page == 200; });
  host(0).start(/*resume=*/true);
  host(0).serve();
  connect();
  EXPECT_EQ(read(8), OpResult::kOk);
  EXPECT_TRUE(has_pages(8));
  EXPECT_EQ(read(3), OpResult::kOk);
  EXPECT_TRUE(has_pages(3)) << "zeros";
  EXPECT_EQ(read(0, 100), OpResult::kOk);
  EXPECT_TRUE(has_pages(0, 100));
  EXPECT_EQ(read(100), OpResult::kAbsent);
  EXPECT_EQ(read(99, 2), OpResult::kAbsent) << "one page of them is not here";
  EXPECT_EQ(read(199, 2), OpResult::kOk) << "a hole, and a page";
  EXPECT_EQ(read(kPages), OpResult::kOutOfRange);
  EXPECT_EQ(read(kPages - 2), OpResult::kAbsent);
  // The states are those of the map.
  ASSERT_EQ(host(0).session->keys()[0].presence.length_bytes, kPages);
  EXPECT_EQ(transport::run_one(*endpoint, {.tag = 1,
                                           .local = local,
                                           .remote = host(0).session->keys()[0].presence,
                                           .remote_offset_bytes = 0,
                                           .length_bytes = kPages}),
            OpResult::kOk);
  for (uint64_t page = 0; page < kPages; ++page) {
    const auto expected = !has_data(page)             ? PageState::kZero
                          : page < 100 || page == 200 ? PageState::kPresent
                                                      : PageState::kAbsent;
    ASSERT_EQ(static_cast<PageState>(memory->base()[page]), expected) << page;
  }
  EXPECT_EQ(read(100), OpResult::kAbsent);
  auto& clone = host(0).add_clone();
  EXPECT_EQ(*clone.word(0, 100), root.expected(100));
  EXPECT_EQ(read(100), OpResult::kOk) << "it has come";
  EXPECT_TRUE(has_pages(100));
}

TEST_F(PartialHolder, ACompleteImageIsServedByTheSameSessionAlsoWhenItWasClosed) {
  host(0).start();
  host(0).serve();
  connect();
  EXPECT_EQ(read(8), OpResult::kAbsent);
  EXPECT_FALSE(host(0).session->failure());
  ASSERT_TRUE(host(0).fetch->sweep().ok());
  ASSERT_TRUE(host(0).reaches(ImageState::kComplete));
  EXPECT_EQ(read(0, 256), OpResult::kOk);
  EXPECT_TRUE(has_pages(0, 256));
  host(0).fetch->close();
  EXPECT_EQ(read(256, 256), OpResult::kOk);
  EXPECT_TRUE(has_pages(256, 256));
  // From now on it can be a root.
  ASSERT_TRUE(host(0).session->scan().ok());
  Host& leaf = host(1);
  leaf.open();
  ASSERT_TRUE(leaf.fetch->connect(host(0).endpoints()).ok());
  ASSERT_TRUE(leaf.fetch->start().ok());
  ASSERT_TRUE(leaf.fetch->sweep().ok());
  leaf.is_right();
  EXPECT_EQ(leaf.from_root(), kDataPages * kPage);
}

TEST_F(PartialHolder, HasNoDataMapBefore) {
  host(0).start();
  host(0).serve();
  ASSERT_TRUE(host(0).session->scan().ok());
  EXPECT_TRUE(eventually([&] { return host(0).session->failure().has_value(); }));
}

TEST_F(PartialHolder, AnImageThatWasClosedIsServedToNobody) {
  host(0).have([](uint64_t page) { return page < 100; });
  host(0).start(/*resume=*/true);
  host(0).serve();
  connect();
  EXPECT_EQ(read(8), OpResult::kOk);
  host(0).fetch->close();
  EXPECT_EQ(read(8), OpResult::kIoError);
  EXPECT_EQ(read(200), OpResult::kIoError);
  Host& leaf = host(1);
  leaf.start();
  leaf.read_from(host(0));
  auto& clone = leaf.add_clone();
  EXPECT_EQ(*clone.word(0, 8), root.expected(8)) << "its readers find another holder";
  EXPECT_TRUE(eventually([&] { return !leaf.fetch->nears()[0].is_connected; }));
}

TEST_F(PartialHolder, NorIsOneThatHasFailed) {
  host(0).have([](uint64_t page) { return page < 100; });
  host(0).start(/*resume=*/true);
  host(0).serve();
  connect();
  host(0).bulk->fail_with(OpResult::kIoError);
  ASSERT_TRUE(host(0).fetch->sweep().ok());
  ASSERT_TRUE(host(0).reaches(ImageState::kFailed));
  EXPECT_EQ(read(8), OpResult::kIoError);
}

/// The server has looked, and has not read yet.
TEST_F(PartialHolder, ClosesWhileItServes) {
  host(0).have([](uint64_t page) { return page < 100; });
  host(0).start(/*resume=*/true);
  host(0).serve();
  connect();
  Gates gates;
  auto& seen = gates.close(InjectPoint::kImageServeSeen, page_key(0, PageIndex{8}));
  auto reading = std::async(std::launch::async, [&] { return read(8); });
  ASSERT_TRUE(gates.wait_parked(seen));
  host(0).fetch->close();  // does not wait for readers
  auto ending = std::async(std::launch::async, [&] { host(0).session.reset(); });
  EXPECT_EQ(ending.wait_for(100ms), std::future_status::timeout) << "the session does";
  gates.open(seen);
  ASSERT_EQ(ending.wait_for(test::kPatience), std::future_status::ready);
  const OpResult result = reading.get();
  EXPECT_TRUE(result == OpResult::kIoError || result == OpResult::kDisconnected);
}

/// A1: whoever sees that the page is present sees its bytes.
TEST_F(PartialHolder, PublishesWhileItServes) {
  host(0).start();
  host(0).serve();
  connect();
  auto& clone = host(0).add_clone();
  std::atomic<uint64_t> touched{0};
  std::thread vcpu([&] {
    for (uint64_t page = 0; page < kPages; ++page) {
      EXPECT_EQ(*clone.word(0, page), root.expected(page));
      touched = page;
    }
  });
  uint64_t absent = 0;
  for (uint64_t page = 0; page < kPages;) {
    const OpResult result = read(page);
    if (result == OpResult::kAbsent) {
      ++absent;
      continue;
    }
    ASSERT_EQ(result, OpResult::kOk);
    ASSERT_TRUE(has_pages(page)) << page;
    ++page;
  }
  vcpu.join();
  // A page that is claimed is not here yet.
  EXPECT_EQ(touched, kPages - 1);
  (void)absent;
}

TEST_F(PartialHolder, AClaimedPageIsAbsent) {
  host(0).start();
  host(0).serve();
  connect();
  auto& clone = host(0).add_clone();
  host(0).demand->hold_all();
  auto touching = clone.read(8);
  ASSERT_TRUE(eventually([&] { return host(0).demand->held_count() == 1; }));
  EXPECT_EQ(read(8), OpResult::kAbsent);
  host(0).demand->release_all();
  ASSERT_TRUE(test::arrives(touching));
  EXPECT_EQ(read(8), OpResult::kOk);
}

TEST(PartialHolderBy, EveryProviderServesOrSaysThatItDoesNot) {
  for (const auto* by : transport::tested_providers()) {
    if (!transport::missing_for(*by).empty()) continue;
    FetchHarness root(FetchHarness::Specs{{Host::kPages, Host::has_data}});
    root.finish_maps();
    const auto listener = transport::must_listen(*by);
    Host relay(root, *listener, *by, 0), leaf(root, *listener, *by, 1);
    relay.have([](uint64_t page) { return page < Host::kPages / 2; });
    relay.start(/*resume=*/true);
    const Status served = relay.try_serve();
    if (by->shares_files) {
      EXPECT_EQ(served.error().code, ErrorCode::kUnsupported) << by->name;
      continue;
    }
    ASSERT_TRUE(served.ok()) << by->name << ": " << served.error().what;
    leaf.start();
    leaf.read_from(relay);
    auto& clone = leaf.add_clone();
    EXPECT_EQ(*clone.word(0, 8), root.expected(8));
    EXPECT_EQ(*clone.word(0, Host::kPages - 4), root.expected(Host::kPages - 4));
    EXPECT_EQ(leaf.from_near(), kPage) << by->name;
    ASSERT_TRUE(leaf.fetch->sweep().ok());
    leaf.is_right();
    EXPECT_EQ(leaf.from_near(), Host::kDataPages / 2 * kPage) << by->name;
  }
}

}  // namespace
}  // namespace vmigrate::pager
