// A fork over two hosts: a parent that runs on, its image on one host, and a clone on the image of the other,
// which reads it over a real transport while both fill.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "source/source.hpp"
#include "tests/image/fetch_harness.hpp"
#include "tests/transport/fixture.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::arrives;
using test::Gates;
using test::ImageHarness;
using test::kPage;
using test::MappedVm;
using test::VmKind;
using transport::Channel;
using wire::ImageCounter;
using wire::InjectPoint;

/// Serves an image over a real transport, and reads it on another "host".
class RemoteTest : public ::testing::TestWithParam<const transport::Provider*> {
 protected:
  static constexpr uint64_t kPages = 2048;
  static bool has_data(uint64_t page) { return page % 4 != 3; }

  void SetUp() override {
    if (const std::string missing = transport::missing_for(*GetParam()); !missing.empty())
      GTEST_SKIP() << missing;
    listener_ = transport::must_listen(*GetParam());
    const std::string path = dir_ / "leaf.image";
    ASSERT_TRUE(memory::Region::create_file(path, kPages * kPage, kPage).ok());
    leaf_.push_back({path, dir_ / "leaf.presence", kPages * kPage, kPage});
  }
  void TearDown() override {
    leaf_fetch_.reset();
    source_.reset();
    clones_.clear();
  }

  /// With a reader its content is served, otherwise the file itself.
  Status serve(const std::string& path, const RegionReader* reader) {
    credentials_.session[0] = ++sessions_;
    const SourceRegionConfig config{path, kPages * kPage, kPage, reader};
    auto opened = SourceSession::open(*listener_, credentials_, {&config, 1});
    if (!opened) return opened.error();
    source_ = std::move(opened).value();
    return ok();
  }
  SourceEndpoints endpoints() {
    SourceEndpoints result;
    for (auto [channel, endpoint] :
         {std::pair{Channel::kDemand, &result.demand}, {Channel::kBulk, &result.bulk}}) {
      auto connected = transport::connect(*GetParam(), listener_->address(), credentials_, channel);
      EXPECT_TRUE(connected.ok()) << connected.error().what;
      *endpoint = std::move(connected).value();
    }
    result.keys.assign(source_->keys().begin(), source_->keys().end());
    result.probe_timeout = 5s;
    return result;
  }
  void open_leaf(bool resume = false) {
    auto opened = ImageFetch::open({leaf_, {}, resume, {}, {}});
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    leaf_fetch_ = std::move(opened).value();
  }
  MappedVm& add_clone() {
    clones_.push_back(
        std::make_unique<MappedVm>(std::vector{leaf_[0].path}, std::vector{kPages * kPage}, VmKind::kClone));
    EXPECT_TRUE(leaf_fetch_->add_clone(clones_.back()->memory).ok());
    return *clones_.back();
  }
  bool leaf_reaches(ImageState state) {
    return test::eventually([&] { return leaf_fetch_->state() == state; });
  }

  test::TempDir dir_;
  transport::Credentials credentials_;
  uint8_t sessions_ = 0;
  std::unique_ptr<transport::Listener> listener_;
  std::unique_ptr<SourceSession> source_;
  std::vector<TargetRegionConfig> leaf_;
  std::vector<std::unique_ptr<MappedVm>> clones_;
  std::unique_ptr<ImageFetch> leaf_fetch_;
};

/// Every provider. These tests run also where the kernel cannot write-protect shared memory.
class RemoteImage : public RemoteTest {};

/// Providers whose threads serve the READs: an image that is still being captured comes when it is asked for.
class RemoteCapture : public RemoteTest {};

std::vector<const transport::Provider*> providers_that_serve() {
  std::vector<const transport::Provider*> found;
  for (const transport::Provider* provider : transport::tested_providers())
    if (provider->serves_by_thread) found.push_back(provider);
  return found;
}

/// Content that no file shows.
class Sevens final : public RegionReader {
 public:
  Status read(uint64_t, std::span<std::byte> out) const override {
    std::memset(out.data(), 7, out.size());
    return ok();
  }
  Status each_data_run(const std::function<void(PageRun)>& visit) const override {
    visit(PageRun{PageIndex{0}, 4});
    return ok();
  }
};

TEST_P(RemoteImage, ContentOfNoFileIsServedByThreadsOnly) {
  const Sevens sevens;
  ASSERT_EQ(serve(leaf_[0].path, &sevens).ok(), GetParam()->serves_by_thread);
  if (!source_) return;
  ASSERT_TRUE(source_->scan().ok());
  open_leaf();
  ASSERT_TRUE(leaf_fetch_->connect(endpoints()).ok());
  ASSERT_TRUE(leaf_fetch_->start().ok());
  ASSERT_TRUE(leaf_fetch_->sweep().ok());
  ASSERT_TRUE(leaf_reaches(ImageState::kComplete));
  const auto words = ImageHarness::contents(leaf_[0].path, kPages * kPage);
  EXPECT_EQ(words[4 * (kPage / 8) - 1], 0x0707070707070707u);
  EXPECT_EQ(words[4 * (kPage / 8)], 0u);
  source_.reset();
}

TEST_P(RemoteCapture, HoldsTheForkPointOfAParentThatRunsOn) {
  ImageHarness root(ImageHarness::Specs{{kPages, has_data}});
  root.open();
  const auto reader = root.capture->reader(0);
  ASSERT_TRUE(serve(root.image_paths[0], reader.get()).ok());
  open_leaf();
  auto& clone = add_clone();
  ASSERT_TRUE(leaf_fetch_->connect(endpoints()).ok());
  root.arm();
  root.seal(Sweep::kLater);
  ASSERT_TRUE(source_->scan().ok());
  ASSERT_TRUE(leaf_fetch_->start().ok());
  std::atomic<bool> is_ended{false};
  std::thread writer([&] {
    for (std::mt19937_64 random(1); !is_ended;)
      root.parent->word(0, random() % kPages)[random() % 512] = random();
  });
  auto& local = root.add_clone();
  // Pages that neither the parent nor a clone of its host has asked for.
  std::mt19937_64 random(2);
  for (int i = 0; i < 300; ++i) {
    const uint64_t page = random() % kPages;
    EXPECT_EQ(*clone.word(0, page), root.expected(page));
  }
  ASSERT_TRUE(root.capture->sweep().ok());
  ASSERT_TRUE(leaf_fetch_->sweep().ok());
  EXPECT_EQ(root.bad_pages(clone), 0u);
  EXPECT_EQ(root.bad_pages(local), 0u);
  ASSERT_TRUE(root.reaches(ImageState::kComplete));
  ASSERT_TRUE(leaf_reaches(ImageState::kComplete));
  is_ended = true;
  writer.join();
  EXPECT_EQ(root.bad_image_pages(), 0u);
  EXPECT_EQ(ImageHarness::contents(leaf_[0].path, kPages * kPage), root.fork_point[0]);
  EXPECT_EQ(root.bad_pages(add_clone()), 0u);
  // The session reads the capture.
  source_.reset();
}

TEST_P(RemoteImage, IsReadFromTheFilesOfACompleteOne) {
  test::FetchHarness host(test::FetchHarness::Specs{{kPages, has_data}});
  ASSERT_TRUE(serve(host.holder_paths[0], nullptr).ok());
  host.open();
  auto& clone = host.add_clone();
  ASSERT_TRUE(host.fetch->connect(endpoints()).ok());
  ASSERT_TRUE(host.fetch->start().ok());
  EXPECT_EQ(*clone.word(0, 8), host.expected(8));
  ASSERT_TRUE(source_->scan().ok());
  ASSERT_TRUE(host.fetch->sweep().ok());
  EXPECT_EQ(host.bad_pages(clone), 0u);
  ASSERT_TRUE(host.reaches(ImageState::kComplete));
  EXPECT_FALSE(clone.is_registered());
  host.fetch->close();
}

/// A reader copies the page for itself, and lets the parent write to it.
TEST(ImageReader, CopiesAPageThatAnotherHostAsksForFirst) {
  ImageHarness root(ImageHarness::Specs{{2048, [](uint64_t page) { return page % 4 != 3; }}});
  Gates gates;
  root.open();
  const auto reader = root.capture->reader(0);
  std::vector<std::byte> bytes(2 * kPage);
  EXPECT_FALSE(reader->read(0, bytes).ok()) << "there is no fork point yet";
  root.arm();
  root.seal(Sweep::kLater);
  auto& claimed = gates.close(InjectPoint::kImageReaderClaimed, page_key(0, PageIndex{100}));
  auto reading = std::async(std::launch::async, [&] { return reader->read(100 * kPage, bytes).ok(); });
  ASSERT_TRUE(gates.wait_parked(claimed));
  auto writing = root.parent->write(100, 1);
  auto& clone = root.add_clone();
  auto touched = clone.read(100);
  EXPECT_TRUE(test::waits(writing));
  EXPECT_TRUE(test::waits(touched));
  gates.open(claimed);
  EXPECT_TRUE(reading.get());
  ASSERT_TRUE(arrives(writing));
  ASSERT_TRUE(arrives(touched));
  EXPECT_EQ(touched.get(), root.expected(100));
  EXPECT_EQ(std::memcmp(bytes.data(), &root.fork_point[0][100 * (kPage / 8)], bytes.size()), 0);
  EXPECT_EQ(root.counter(ImageCounter::kCopiedBytes), 12 * kPage) << "the data pages of one cluster";
  root.capture->close();
}

/// F13 and F14: a reader that is about to release pages of the parent holds up the end of the capture,
/// because the next capture of the same parent protects them again.
TEST(ImageReader, TouchesTheParentNoMoreAfterItsRelease) {
  ImageHarness root(ImageHarness::Specs{{16}});
  Gates gates;
  root.open();
  const auto reader = root.capture->reader(0);
  root.arm();
  root.seal(Sweep::kLater);
  auto& published = gates.close(InjectPoint::kImagePublished);
  std::vector<std::byte> bytes(kPage);
  auto reading = std::async(std::launch::async, [&] { return reader->read(0, bytes).ok(); });
  ASSERT_TRUE(gates.wait_parked(published));
  auto closing = std::async(std::launch::async, [&] { root.capture->close(); });
  EXPECT_EQ(closing.wait_for(100ms), std::future_status::timeout);
  EXPECT_TRUE(root.parent->is_registered());
  gates.open(published);
  ASSERT_EQ(closing.wait_for(test::kPatience), std::future_status::ready);
  (void)reading.get();
  EXPECT_FALSE(root.parent->is_registered());
  EXPECT_FALSE(reader->read(0, bytes).ok()) << "a capture that was given up serves nobody";
}

INSTANTIATE_TEST_SUITE_P(Providers, RemoteCapture, ::testing::ValuesIn(providers_that_serve()),
                         [](const auto& tested) { return std::string(tested.param->name); });
INSTANTIATE_TEST_SUITE_P(Providers, RemoteImage, ::testing::ValuesIn(transport::tested_providers()),
                         [](const auto& tested) { return std::string(tested.param->name); });

}  // namespace
}  // namespace vmigrate::pager
