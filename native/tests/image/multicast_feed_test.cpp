// Tests an image that a root sends by multicast, over the loopback, to hosts that read the rest from it.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "multicast/datagram/writer.hpp"
#include "tests/image/fetch_harness.hpp"
#include "tests/multicast/harness.hpp"
#include "tests/support/small_tmpfs.hpp"

namespace vmigrate::pager {
namespace {

using multicast::Group;
using multicast::ReceiverState;
using multicast::SenderState;
using test::all_but_each_fourth;
using test::arrives;
using test::eventually;
using test::FetchHarness;
using test::kPage;
using test::LossyPort;
using test::random_group;
using wire::ImageCounter;

std::unique_ptr<multicast::MulticastSender> open_sender(const FetchHarness& root, const Group& group,
                                                        uint64_t bandwidth_bytes_per_s) {
  multicast::SenderConfig config;
  for (size_t i = 0; i < root.lengths.size(); ++i)
    config.image.push_back({root.holder_paths[i], root.lengths[i], kPage});
  config.group = group;
  config.bandwidth_bytes_per_s = bandwidth_bytes_per_s;
  auto sender = multicast::MulticastSender::open(std::move(config));
  EXPECT_TRUE(sender.ok()) << sender.error().what;
  return std::move(sender).value();
}

Status join(FetchHarness& host, const Group& group, const LossyPort::Faults& faults = {}) {
  return host.fetch->join_multicast(
      group, 1,
      std::make_unique<LossyPort>(test::open_test_port(group, multicast::Role::kReceiver), faults, 7));
}

bool ends(const FetchHarness& host, ReceiverState state = ReceiverState::kEnded) {
  return eventually([&] { return host.fetch->multicast().state == state; });
}

void expect_complete(FetchHarness& host) {
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_EQ(host.bad_pages(host.add_clone()), 0u);
  EXPECT_EQ(host.counter(ImageCounter::kMulticastBytes) + host.counter(ImageCounter::kDemandBytes) +
                host.counter(ImageCounter::kPrefetchBytes),
            host.counter(ImageCounter::kCopiedBytes));
  EXPECT_EQ(host.counter(ImageCounter::kCopiedBytes), host.counter(ImageCounter::kPagesCopied) * kPage);
}

TEST(MulticastFeed, BringsPagesAndTheRestIsReadFromTheRoot) {
  for (const double loss : {0.0, 0.1}) {
    const Group group = random_group(loss == 0 ? 9000 : 1500);
    FetchHarness host(FetchHarness::Specs{{2048, all_but_each_fourth}, {64}});
    host.finish_maps();
    host.start();
    EXPECT_FALSE(host.fetch->multicast().has_joined);
    ASSERT_TRUE(join(host, group, {.loss = loss}).ok());
    EXPECT_EQ(join(host, group).error().code, ErrorCode::kAlreadyExists);
    const auto sender = open_sender(host, group, 30'000'000);
    ASSERT_TRUE(sender->start().ok());
    ASSERT_TRUE(ends(host));
    const MulticastSnapshot got = host.fetch->multicast();
    EXPECT_GT(got.pages, 400u);
    EXPECT_TRUE(loss == 0 || got.received.lost_datagrams > 0);
    EXPECT_EQ(host.counter(ImageCounter::kMulticastBytes), got.pages * kPage);
    EXPECT_EQ(host.counter(ImageCounter::kPrefetchBytes), 0u);
    expect_complete(host);
    EXPECT_EQ(host.counter(ImageCounter::kMulticastLostDatagrams), got.received.lost_datagrams);
    EXPECT_TRUE(test::image_threads_end());
  }
}

/// Until the first READ, that is, for as long as the root has no time.
TEST(MulticastFeed, BringsPagesBeforeTheSessionIsConnectedOrStarted) {
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{512}});
  host.finish_maps();
  host.open();
  auto& clone = host.add_clone();
  auto waiting = clone.read(200);
  ASSERT_TRUE(join(host, group).ok());
  const auto sender = open_sender(host, group, 20'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(ends(host));
  EXPECT_GT(host.fetch->multicast().pages, 100u);
  EXPECT_TRUE(test::waits(waiting));
  ASSERT_TRUE(host.fetch->connect(host.endpoints()).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  ASSERT_TRUE(arrives(waiting));
  EXPECT_EQ(waiting.get(), host.expected(200));
  expect_complete(host);
}

TEST(MulticastFeed, APageThatAnotherLaneHasClaimedIsLeftToIt) {
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{512}});
  host.finish_maps();
  host.start();
  host.demand->hold_all();
  auto& clone = host.add_clone();
  auto waiting = clone.read(9);
  ASSERT_TRUE(eventually([&] { return host.demand->held_count() == 1; }));
  ASSERT_TRUE(join(host, group).ok());
  const auto sender = open_sender(host, group, 20'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(ends(host));
  EXPECT_TRUE(test::waits(waiting));
  EXPECT_LT(host.fetch->multicast().pages, 512u);
  host.demand->release_all();
  ASSERT_TRUE(arrives(waiting));
  EXPECT_EQ(waiting.get(), host.expected(9));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), kPage);
  expect_complete(host);
}

TEST(MulticastFeed, PagesAroundAFaultComeFirst) {
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{6000}});
  host.finish_maps();
  host.start();
  auto& clone = host.add_clone();
  ASSERT_TRUE(join(host, group).ok());
  const auto sender = open_sender(host, group, 5'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(eventually([&] { return host.fetch->multicast().pages > 50; }));
  auto fault = clone.read(5600);
  ASSERT_TRUE(arrives(fault));
  // The neighbours come by multicast, long before their turn: a file's pages do not show what came how, so a
  // fault on one of them needs no READ.
  const auto is_allocated = [&](uint64_t page) {
    const UniqueFd image(::open(host.image_paths[0].c_str(), O_RDONLY | O_CLOEXEC));
    return ::lseek(image.get(), static_cast<off_t>(page * kPage), SEEK_DATA) ==
           static_cast<off_t>(page * kPage);
  };
  ASSERT_TRUE(eventually([&] { return is_allocated(5601) && is_allocated(5603); }));
  EXPECT_FALSE(is_allocated(5700));
  EXPECT_EQ(host.counter(ImageCounter::kDemandBytes), kPage);
  sender->close();
}

/// A member that knows the key forges pages. Digests find it out; the multicast is over, and the image is
/// not.
TEST(MulticastFeed, ForgedPagesEndTheMulticastAndNotTheImage) {
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{512}});
  host.use_digests();
  host.know_all();
  host.finish_maps();
  host.start();
  ASSERT_TRUE(join(host, group).ok());
  const auto port = test::open_test_port(group, multicast::Role::kSender);
  const auto auth = std::move(multicast::DatagramAuth::create(group.key)).value();
  multicast::DatagramWriter writer(*auth, group.session, multicast::kSenderMember, 1);
  std::vector<std::byte> datagram(sizeof(multicast::DatagramHeader) + kPage, std::byte{0x5a});
  uint64_t page = 0;
  ASSERT_TRUE(eventually([&] {
    EXPECT_TRUE(writer.finish(datagram, multicast::DatagramKind::kData, 0, page++ % 512 * kPage));
    EXPECT_TRUE(port->send(datagram, datagram.size()).ok());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return host.fetch->multicast().state == ReceiverState::kFailed;
  }));
  EXPECT_EQ(host.fetch->multicast().failure->code, ErrorCode::kDamaged);
  EXPECT_EQ(host.fetch->multicast().pages, 0u);
  EXPECT_EQ(host.fetch->state(), ImageState::kCopying);
  EXPECT_LT(host.counter(ImageCounter::kRefusedPages), 20u);
  expect_complete(host);
}

/// It is full in the middle of a run of pages that are stored with one call. What was written of the run is
/// published, or is not in the file.
TEST(MulticastFeed, AFileSystemThatFillsUpEndsTheMulticastAndNotTheImage) {
  constexpr uint64_t kRoomPages = 251;
  const test::SmallTmpfs full("size=64m");
  ASSERT_TRUE(full.is_mounted()) << strerror(errno);
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{512}}, full.path());
  host.finish_maps();
  host.start();
  // A file that would not fit is not even created.
  full.resize("size=1004k");
  ASSERT_TRUE(join(host, group).ok());
  const auto sender = open_sender(host, group, 20'000'000);
  ASSERT_TRUE(sender->start().ok());
  ASSERT_TRUE(ends(host, ReceiverState::kFailed));
  const MulticastSnapshot got = host.fetch->multicast();
  EXPECT_EQ(got.failure->code, ErrorCode::kNoSpace);
  EXPECT_EQ(got.pages, kRoomPages);
  EXPECT_EQ(host.allocated_bytes(), kRoomPages * kPage);
  EXPECT_EQ(host.fetch->state(), ImageState::kCopying);
  full.resize("size=64m");
  expect_complete(host);
}

TEST(MulticastFeed, EndsWithTheSessionWhateverItsState) {
  const Group group = random_group(9000);
  for (int i = 0; i < 6; ++i) {
    FetchHarness host(FetchHarness::Specs{{4096}});
    host.finish_maps();
    if (i % 2 == 0)
      host.start();
    else
      host.open();
    ASSERT_TRUE(join(host, group).ok());
    const auto sender = open_sender(host, group, 20'000'000);
    ASSERT_TRUE(i == 0 || sender->start().ok());
    ASSERT_TRUE(i < 2 || eventually([&] { return host.fetch->multicast().pages > 10; }));
    if (i > 3) sender->close();
    host.fetch->close();
    EXPECT_EQ(join(host, group).error().code, ErrorCode::kClosed);
    const uint64_t pages = host.fetch->multicast().pages;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(host.fetch->multicast().pages, pages) << "nothing comes after close";
  }
}

TEST(MulticastFeed, AnImageThatIsCompleteNeedsItNoMore) {
  const Group group = random_group(9000);
  FetchHarness host(FetchHarness::Specs{{64}});
  host.finish_maps();
  host.start();
  ASSERT_TRUE(join(host, group).ok());
  expect_complete(host);
  EXPECT_TRUE(ends(host)) << "it leaves the group by itself";
  EXPECT_EQ(host.fetch->multicast().pages, 0u);
}

TEST(MulticastFeed, HugePagesAreRefused) {
  test::TempDir dir;
  ImageFetchConfig config;
  config.image.push_back({dir / "ram", dir / "presence", 4 << 20, 2 << 20});
  ASSERT_TRUE(memory::Region::create_file(dir / "ram", 4 << 20, 2 << 20).ok());
  auto fetch = ImageFetch::open(std::move(config));
  ASSERT_TRUE(fetch.ok()) << fetch.error().what;
  EXPECT_EQ(fetch.value()->join_multicast(random_group(), 1).error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace vmigrate::pager
