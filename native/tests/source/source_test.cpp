#include "source/source.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>

#include "memory/region.hpp"
#include "tests/source/book_listener.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using namespace std::chrono_literals;
using test::Bookkeeping;
using test::BookListener;
using test::Exposed;
using test::kPage;
using test::Parking;
using wire::SourceCounter;

class Source : public ::testing::Test {
 protected:
  void make_region(const std::string& name, uint64_t page_count, std::function<bool(uint64_t)> has_data) {
    ASSERT_TRUE(memory::Region::create_file(dir_ / name, page_count * kPage, kPage).ok());
    const UniqueFd fd(::open((dir_ / name).c_str(), O_RDWR | O_CLOEXEC));
    for (uint64_t page = 0; page < page_count; ++page) {
      if (has_data(page)) test::write_pattern(fd.get(), 1, page);
    }
    configs_.push_back({dir_ / name, page_count * kPage, kPage});
  }
  void open() {
    auto opened = SourceSession::open(listener_, {}, configs_);
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    session_ = std::move(opened).value();
  }
  wire::DataMapHeader header(size_t region) const {
    wire::DataMapHeader result{};
    const auto& memory = book_.exposed[2 * region + 1].memory;
    EXPECT_EQ(::pread(memory.fd, &result, sizeof(result), 0), static_cast<ssize_t>(sizeof(result)));
    return result;
  }
  bool bit(size_t region, uint64_t page) const {
    const auto& memory = book_.exposed[2 * region + 1].memory;
    uint8_t byte = 0;
    EXPECT_EQ(::pread(memory.fd, &byte, 1, static_cast<off_t>(wire::kDataMapHeaderBytes + page / 8)), 1);
    return (byte >> page % 8 & 1) != 0;
  }
  uint64_t counter(SourceCounter which) const {
    std::array<uint64_t, wire::kSourceCounterCount> all{};
    session_->counters(all);
    return all[static_cast<size_t>(which)];
  }

  test::TempDir dir_;
  Bookkeeping book_;
  BookListener listener_{book_};
  std::vector<SourceRegionConfig> configs_;
  std::unique_ptr<SourceSession> session_;
};

/// Of what a region of so many pages holds, read in one go.
std::vector<std::byte> digests_of(const std::vector<std::byte>& content,
                                  const memory::ChunkRequest& request) {
  const auto read = [&](uint64_t at, std::span<std::byte> out) {
    std::memcpy(out.data(), content.data() + at, out.size());
    return ok();
  };
  return memory::digest_chunks(request, content.size() / kPage, kPage,
                               [&](memory::PageTagger& tagger, PageRun run, std::span<std::byte> tags) {
                                 return tagger.tag(request.region_index, kPage, run, read, tags);
                               })
      .value();
}

TEST_F(Source, DigestsAreThoseOfDataAndHoles) {
  make_region("a", 3, [](uint64_t) { return true; });
  make_region("b", 1300, [](uint64_t page) { return page < 5 || page == 1200; });
  open();
  std::vector<std::byte> content(1300 * kPage);
  const UniqueFd fd(::open((dir_ / "b").c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::pread(fd.get(), content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
  const memory::ChunkRequest request{{7}, 1, 0, 3};
  const auto digests = session_->digest_chunks(request);
  ASSERT_TRUE(digests.ok()) << digests.error().what;
  EXPECT_EQ(digests.value(), digests_of(content, request));
  content[1200 * kPage] ^= std::byte{1};
  EXPECT_NE(digests.value(), digests_of(content, request));
  EXPECT_FALSE(session_->digest_chunks({{7}, 2, 0, 1}).ok());
  EXPECT_FALSE(session_->digest_chunks({{7}, 0, 1, 1}).ok());
  struct stat file {};
  ASSERT_EQ(::stat((dir_ / "b").c_str(), &file), 0);
  EXPECT_EQ(file.st_blocks, 6 * 8) << "holes stay holes";
}

TEST_F(Source, AFileThatWasCutHasNoDigests) {
  for (const bool has_data : {true, false}) {
    const std::string name = has_data ? "cut" : "cut-hole";
    configs_.clear();
    make_region(name, 600, [&](uint64_t page) { return has_data || page == 0; });
    open();
    ASSERT_EQ(::truncate((dir_ / name).c_str(), 520 * kPage), 0);
    const auto digests = session_->digest_chunks({{7}, 0, 1, 1});
    ASSERT_FALSE(digests.ok());
    EXPECT_EQ(digests.error().code, ErrorCode::kRegionChanged);
    session_.reset();
  }
}

TEST_F(Source, ExposesRegionsAndMapsReadOnly) {
  make_region("a", 20, [](uint64_t) { return true; });
  make_region("b", 3, [](uint64_t) { return false; });
  open();
  ASSERT_EQ(session_->keys().size(), 2u);
  ASSERT_EQ(book_.exposed.size(), 4u);
  for (const Exposed& exposed : book_.exposed) {
    EXPECT_EQ(exposed.access, transport::Access::kRead);
    EXPECT_EQ(::fcntl(exposed.memory.fd, F_GETFL) & O_ACCMODE, O_RDONLY);
  }
  EXPECT_EQ(session_->keys()[0].ram.length_bytes, 20 * kPage);
  EXPECT_EQ(session_->keys()[0].data_map.length_bytes, 64u << 10)
      << "a READ of a whole map fills several frames";
  EXPECT_EQ(header(0).ready, 0u);
  EXPECT_EQ(header(0).magic, wire::kDataMapMagic);
  EXPECT_EQ(header(0).page_count, 20u);
  session_.reset();
  EXPECT_FALSE(book_.session_alive);
}

TEST_F(Source, ScanFindsDataAndHoles) {
  const auto has_data = [](uint64_t page) { return page % 3 == 1 || (page > 40 && page < 90) || page == 99; };
  make_region("a", 100, has_data);
  make_region("b", 9, [](uint64_t) { return false; });
  open();
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(session_->scan().ok()) << "twice is once";
  ASSERT_TRUE(test::eventually([&] { return header(0).ready == 1 && header(1).ready == 1; }));
  uint64_t data = 0;
  for (uint64_t page = 0; page < 100; ++page) {
    EXPECT_EQ(bit(0, page), has_data(page)) << page;
    data += has_data(page) ? 1 : 0;
  }
  EXPECT_EQ(header(0).data_page_count, data);
  EXPECT_EQ(header(1).data_page_count, 0u);
  EXPECT_TRUE(test::eventually([&] { return counter(SourceCounter::kZeroPages) == 109 - data; }));
  EXPECT_EQ(counter(SourceCounter::kDataPages), data);
  EXPECT_EQ(counter(SourceCounter::kReadBytes), 4096u);
  EXPECT_EQ(counter(SourceCounter::kRejectedHellos), 7u);
  EXPECT_FALSE(session_->failure());
}

TEST_F(Source, HolesThatExposingHasFilledStayHolesUnlessTheVmHasWrittenToThem) {
  const auto has_data = [](uint64_t page) { return page % 5 == 0 && page < 400; };
  make_region("a", 700, has_data);
  book_.fills_holes = true;
  open();
  struct stat file {};
  ASSERT_EQ(::stat((dir_ / "a").c_str(), &file), 0);
  ASSERT_EQ(static_cast<uint64_t>(file.st_blocks) * 512, 700 * kPage) << "every hole is filled";
  // The VM runs on and writes: within the data, at either end of a hole, and in a page's last byte alone.
  const UniqueFd fd(::open((dir_ / "a").c_str(), O_RDWR | O_CLOEXEC));
  const auto written = [](uint64_t page) { return page == 6 || (page >= 409 && page < 412) || page == 699; };
  for (uint64_t page = 0; page < 700; ++page) {
    const char last = 1;
    if (written(page)) {
      ASSERT_EQ(::pwrite(fd.get(), &last, 1, static_cast<off_t>((page + 1) * kPage - 1)), 1);
    }
  }
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(test::eventually([&] { return header(0).ready == 1; }));
  uint64_t data = 0;
  for (uint64_t page = 0; page < 700; ++page) {
    const bool expected = has_data(page) || written(page);
    EXPECT_EQ(bit(0, page), expected) << page;
    data += expected ? 1 : 0;
  }
  EXPECT_EQ(header(0).data_page_count, data);
  EXPECT_FALSE(session_->failure());
}

TEST_F(Source, ARegionThatShrankIsNeverCalledReady) {
  Parking parking;
  make_region("a", 64, [](uint64_t) { return true; });
  open();
  parking.arm(wire::InjectPoint::kSourceScan);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(parking.wait_parked());
  ASSERT_EQ(::truncate((dir_ / "a").c_str(), 10 * kPage), 0);
  parking.release();
  ASSERT_TRUE(test::eventually([&] { return session_->failure().has_value(); }));
  EXPECT_EQ(session_->failure()->code, ErrorCode::kRegionChanged);
  EXPECT_EQ(header(0).ready, 0u);
}

TEST_F(Source, RefusesRegionsThatAreNotThere) {
  configs_.push_back({dir_ / "nothing", kPage, kPage});
  auto opened = SourceSession::open(listener_, {}, configs_);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kNotFound);
  EXPECT_FALSE(book_.session_alive);
  opened = SourceSession::open(listener_, {}, {});
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(Source, ClosesWhileItsScanIsParked) {
  Parking parking;
  make_region("a", 64, [](uint64_t) { return true; });
  open();
  parking.arm(wire::InjectPoint::kSourceScan);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(parking.wait_parked());
  auto closing = std::async(std::launch::async, [&] { session_.reset(); });
  EXPECT_EQ(closing.wait_for(20ms), std::future_status::timeout);
  parking.release();
  EXPECT_EQ(closing.wait_for(test::kPatience), std::future_status::ready);
}

}  // namespace
}  // namespace vmigrate::pager
