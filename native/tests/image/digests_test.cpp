// Tests the digests of an image: those that a host makes, and those that it accepts from another host.

#include "image/digests/digests.hpp"

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/stat.h>

#include <cstring>
#include <future>

#include "tests/image/fetch_harness.hpp"

namespace vmigrate::pager {
namespace {

using test::all_but_each_fourth;
using test::FetchHarness;
using test::kPage;

constexpr uint64_t kDigestPages = 4096;

struct Files {
  Files() {
    config.path = dir / "ram";
    config.digest_path = dir / "ram.digests";
    config.length_bytes = kDigestPages * kPage;
    config.page_bytes = kPage;
    EXPECT_TRUE(memory::Region::create_file(config.path, config.length_bytes, kPage).ok());
    fd.reset(::open(config.path.c_str(), O_RDWR | O_CLOEXEC));
    for (uint64_t page = 0; page < kDigestPages; ++page)
      if (all_but_each_fourth(page)) test::write_pattern(fd.get(), 1, page);
  }
  std::shared_ptr<ImageDigests> open() {
    auto opened = ImageDigests::open({&config, 1});
    EXPECT_TRUE(opened.ok()) << (opened.ok() ? "" : opened.error().what);
    return opened.value();
  }
  test::TempDir dir;
  DigestRegionConfig config;
  UniqueFd fd;
};

TEST(ImageDigests, AreMadePieceByPieceAndKept) {
  Files files;
  struct stat before {
  }, after{};
  ASSERT_EQ(::fstat(files.fd.get(), &before), 0);
  {
    auto digests = files.open();
    EXPECT_EQ(digests->known(0).value(), 0u);
    ASSERT_TRUE(digests->make(0, 5).ok());
    ASSERT_TRUE(digests->make(0, 0).ok());
    ASSERT_TRUE(digests->make(0, 3000).ok());
    EXPECT_EQ(digests->known(0).value(), 3005u);
  }
  auto digests = files.open();
  EXPECT_EQ(digests->known(0).value(), 3005u);
  EXPECT_EQ(digests->make(0, kDigestPages).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(digests->make(0, kDigestPages - 3005).ok());
  ASSERT_EQ(::fstat(files.fd.get(), &after), 0);
  EXPECT_EQ(before.st_blocks, after.st_blocks) << "holes stay holes";
  auto hasher = memory::PageHasher::create();
  ASSERT_TRUE(hasher.ok());
  hasher.value()->begin(files.fd.get(), kPage, {PageIndex{0}, kDigestPages});
  const memory::Digest zeros = *memory::digest_of_zeros(kPage);
  for (uint64_t page = 0; page < kDigestPages; ++page) {
    const auto digest = digests->map(0).digest(PageIndex{page});
    EXPECT_EQ(hasher.value()->next().value(), digest);
    EXPECT_EQ(digest == zeros, !all_but_each_fourth(page));
  }
}

TEST(ImageDigests, AreReadOnlyAsFarAsTheyAreKnown) {
  Files files;
  auto digests = files.open();
  ASSERT_TRUE(digests->make(0, 100).ok());
  const auto bytes = digests->read(0, PageIndex{10}, 90);
  ASSERT_TRUE(bytes.ok());
  EXPECT_EQ(bytes.value().size(), 90u * wire::kDigestBytes);
  const auto known = digests->map(0).digests({PageIndex{10}, 90});
  EXPECT_TRUE(std::equal(known.begin(), known.end(), bytes.value().begin(), bytes.value().end()));
  EXPECT_TRUE(digests->read(0, PageIndex{100}, 0).ok());
  for (const auto& [first, count] :
       {std::pair<uint64_t, uint64_t>{10, 91}, {101, 0}, {5, UINT64_MAX}, {UINT64_MAX, 2}})
    EXPECT_EQ(digests->read(0, PageIndex{first}, count).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(digests->known(1).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(digests->make(1, 1).error().code, ErrorCode::kInvalidArgument);
}

TEST(ImageDigests, AreAcceptedInOrderOnly) {
  Files files;
  auto digests = files.open();
  std::vector<std::byte> bytes(kDigestPages * wire::kDigestBytes, std::byte{5});
  const auto accept = [&](uint64_t first, size_t length_bytes) {
    const Status accepted = digests->accept(0, PageIndex{first}, std::span(bytes).first(length_bytes));
    return accepted ? ErrorCode{} : accepted.error().code;
  };
  EXPECT_EQ(accept(1, 16), ErrorCode::kInvalidArgument);
  EXPECT_EQ(accept(0, 15), ErrorCode::kProtocol);
  EXPECT_EQ(accept(0, 0), ErrorCode{});
  EXPECT_EQ(accept(0, 32), ErrorCode{});
  EXPECT_EQ(accept(0, 16), ErrorCode::kInvalidArgument);
  EXPECT_EQ(accept(2, bytes.size()), ErrorCode::kProtocol);
  EXPECT_EQ(accept(2, bytes.size() - 32), ErrorCode{});
  EXPECT_EQ(accept(kDigestPages, 16), ErrorCode::kProtocol);
  EXPECT_EQ(digests->known(0).value(), kDigestPages);
  EXPECT_EQ(digests->accept(1, PageIndex{0}, {}).error().code, ErrorCode::kInvalidArgument);
}

TEST(ImageDigests, AFileThatWasCutIsAnErrorAndNoSignal) {
  Files files;
  auto digests = files.open();
  ASSERT_EQ(::ftruncate(files.fd.get(), 2000 * kPage), 0);
  EXPECT_EQ(digests->make(0, kDigestPages).error().code, ErrorCode::kRegionChanged);
  EXPECT_LE(digests->known(0).value(), 2000u);
  const auto again = ImageDigests::open({&files.config, 1});
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().code, ErrorCode::kRegionChanged);
}

TEST(ImageDigests, RefuseRegionsThatCannotBe) {
  Files files;
  const auto refused = [](const DigestRegionConfig& config) { return ImageDigests::open({&config, 1}); };
  auto config = files.config;
  config.page_bytes = 8192;
  EXPECT_EQ(refused(config).error().code, ErrorCode::kInvalidArgument);
  config = files.config;
  config.length_bytes += 1;
  EXPECT_EQ(refused(config).error().code, ErrorCode::kInvalidArgument);
  config = files.config;
  config.path = files.dir / "none";
  EXPECT_EQ(refused(config).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(ImageDigests::open({}).error().code, ErrorCode::kInvalidArgument);
}

TEST(ImageDigests, AreMadeByTwoThreadsWithoutAGap) {
  Files files;
  auto digests = files.open();
  std::vector<std::future<bool>> making;
  for (int thread = 0; thread < 4; ++thread)
    making.push_back(std::async(std::launch::async, [&] { return digests->make(0, kDigestPages / 4).ok(); }));
  for (auto& each : making) EXPECT_TRUE(each.get());
  EXPECT_EQ(digests->known(0).value(), kDigestPages);
  digests->stop();
  auto other = files.open();
  EXPECT_TRUE(std::memcmp(other->map(0).digests({PageIndex{0}, kDigestPages}).data(),
                          digests->map(0).digests({PageIndex{0}, kDigestPages}).data(),
                          kDigestPages * wire::kDigestBytes) == 0);
}

TEST(ImageDigests, AreNotMadeAnyMoreOnceStopped) {
  Files files;
  auto digests = files.open();
  digests->stop();
  EXPECT_EQ(digests->make(0, 1).error().code, ErrorCode::kClosed);
  EXPECT_EQ(digests->known(0).value(), 0u);
}

TEST(ImageFetch, RefusesDigestsOfOtherRegions) {
  FetchHarness host(FetchHarness::Specs{{64}, {64}});
  FetchHarness other(FetchHarness::Specs{{64}, {128}});
  FetchHarness fewer(FetchHarness::Specs{{64}});
  for (FetchHarness* wrong : {&other, &fewer}) {
    wrong->use_digests();
    ImageFetchConfig config;
    for (size_t i = 0; i < host.lengths.size(); ++i)
      config.image.push_back({host.image_paths[i], host.presence_paths[i], host.lengths[i], kPage});
    config.digests = wrong->digests;
    const auto opened = ImageFetch::open(std::move(config));
    ASSERT_FALSE(opened.ok());
    EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace vmigrate::pager
