// Tests a clone that leaves: its memory is in the image's files, except for the pages that it has written,
// which are in its process.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/page_key.hpp"
#include "source/source.hpp"
#include "tests/image/harness.hpp"
#include "tests/preload/preload_fixture.hpp"
#include "tests/source/book_listener.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::pager {
namespace {

using test::eventually;
using test::kMiB;
using test::kPage;
using test::Parking;
using wire::SourceCounter;

constexpr uint64_t kLengthBytes = 4 * kMiB;
/// Pages of the image with data; the rest are holes.
constexpr uint64_t kDataPages = 512;
constexpr uint64_t kOwnPages = 4;

class CloneSource : public test::PreloadTest {
 protected:
  void SetUp() override {
    PreloadTest::SetUp();
    image_ = region("image", kLengthBytes);
    image_.is_private = true;
    own_path_ = path("ram.own");
    const UniqueFd fd(::open(image_.path.c_str(), O_RDWR | O_CLOEXEC));
    expected_.resize(kLengthBytes);
    for (uint64_t page = 0; page < kDataPages; ++page)
      std::memset(&expected_[page * kPage], static_cast<int>(page % 255 + 1), kPage);
    ASSERT_EQ(::pwrite(fd.get(), expected_.data(), kDataPages * kPage, 0),
              static_cast<ssize_t>(kDataPages * kPage));
    listener_ = listen({image_}, false);
    clone_ = helper({image_});
    ASSERT_EQ(clone_->ask(test::map_line(image_, "private")), "mapped 0");
    ASSERT_NE(listener_->memory(), nullptr);
    for (const uint64_t page : {uint64_t{10}, uint64_t{11}, kDataPages - 1}) write(page * kPage + 77, 0);
    write(600 * kPage, 9);  // a hole of the image
    // Reading a shared page does not make it an own page.
    ASSERT_EQ(clone_->ask("touch 0 " + std::to_string(20 * kPage)), "byte 21");
    allocated_bytes_ = allocated_bytes();
  }
  void write(uint64_t offset, unsigned value) {
    const std::string words = std::to_string(offset) + " " + std::to_string(value);
    ASSERT_EQ(clone_->ask("poke 0 " + words), "poked");
    expected_[offset] = static_cast<char>(value);
  }
  Result<std::unique_ptr<SourceSession>> try_open(bool resume, bool has_process = true) {
    const std::vector<SourceRegionConfig> regions{{image_.path, kLengthBytes, kPage}};
    const SourceCloneConfig clone{has_process ? listener_->memory() : nullptr, {own_path_}, resume};
    return SourceSession::open(book_listener_, {}, regions, &clone);
  }
  void open(bool resume = false, bool has_process = true) {
    book_.exposed.clear();
    auto opened = try_open(resume, has_process);
    ASSERT_TRUE(opened.ok()) << opened.error().what;
    session_ = std::move(opened).value();
  }
  const transport::MemoryReader& memory() const { return *book_.exposed[0].memory.reader; }
  /// In pieces with arbitrary begin and end.
  uint64_t bad_bytes() const {
    std::vector<char> seen(kLengthBytes, 55);
    for (uint64_t at = 0, step = 1; at < kLengthBytes; at += step) {
      step = std::min<uint64_t>(kLengthBytes - at, at % 3 == 0 ? 70'001 : 4096);
      const auto part = std::as_writable_bytes(std::span(seen)).subspan(at, step);
      if (const Status read = memory().read(at, part); !read) {
        ADD_FAILURE() << read.error().what;
        return kLengthBytes;
      }
    }
    uint64_t bad = 0;
    for (uint64_t i = 0; i < kLengthBytes; ++i) bad += seen[i] == expected_[i] ? 0 : 1;
    return bad;
  }
  Status read_page(uint64_t page) const {
    std::array<std::byte, kPage> bytes;
    return memory().read(page * kPage, bytes);
  }
  wire::DataMapHeader header() const {
    wire::DataMapHeader result{};
    EXPECT_EQ(::pread(book_.exposed[1].memory.fd, &result, sizeof result, 0),
              static_cast<ssize_t>(sizeof result));
    return result;
  }
  bool bit(uint64_t page) const {
    uint8_t byte = 0;
    const auto at = static_cast<off_t>(wire::kDataMapHeaderBytes + page / 8);
    EXPECT_EQ(::pread(book_.exposed[1].memory.fd, &byte, 1, at), 1);
    return (byte >> page % 8 & 1) != 0;
  }
  uint64_t counter(SourceCounter which) const {
    std::array<uint64_t, wire::kSourceCounterCount> all{};
    session_->counters(all);
    return all[static_cast<size_t>(which)];
  }
  [[nodiscard]] bool is_kept() const {
    return eventually([this] { return has_file(own_path_) || session_->failure(); }) && has_file(own_path_);
  }
  static bool has_file(const std::string& name) { return ::access(name.c_str(), F_OK) == 0; }
  uint64_t allocated_bytes() const {
    struct stat file {};
    EXPECT_EQ(::stat(image_.path.c_str(), &file), 0);
    return static_cast<uint64_t>(file.st_blocks) * 512;
  }

  RegionFileConfig image_;
  std::string own_path_;
  std::vector<char> expected_;
  uint64_t allocated_bytes_ = 0;
  std::unique_ptr<PreloadListener> listener_;
  std::unique_ptr<test::ChildProcess> clone_;
  test::Bookkeeping book_;
  test::BookListener book_listener_{book_};
  std::unique_ptr<SourceSession> session_;
};

TEST_F(CloneSource, ServesWhatItHasWrittenAndTheImageBeneathIt) {
  Parking parking;
  open();
  EXPECT_EQ(bad_bytes(), 0u) << "before anybody has looked";
  parking.arm(wire::InjectPoint::kSourceKeep);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(parking.wait_parked());
  EXPECT_EQ(bad_bytes(), 0u) << "while its pages are copied";
  EXPECT_EQ(header().ready, 1u) << "the target does not wait for that";
  EXPECT_EQ(header().data_page_count, kDataPages + 1);
  for (uint64_t page = 0; page < kLengthBytes / kPage; ++page)
    EXPECT_EQ(bit(page), page < kDataPages || page == 600) << page;
  EXPECT_EQ(counter(SourceCounter::kOwnPages), kOwnPages);
  EXPECT_EQ(counter(SourceCounter::kOwnPagesKept), 0u);
  EXPECT_FALSE(has_file(own_path_));
  parking.release();
  ASSERT_TRUE(is_kept());
  EXPECT_TRUE(eventually([this] { return counter(SourceCounter::kOwnPagesKept) == kOwnPages; }));
  EXPECT_EQ(bad_bytes(), 0u) << "from their file";
  EXPECT_FALSE(session_->failure());
  EXPECT_EQ(allocated_bytes(), allocated_bytes_) << "nobody has filled holes of the image by looking";
}

TEST_F(CloneSource, NeedsNoProcessOnceItsPagesAreKept) {
  open();
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(is_kept());
  clone_->kill_now();
  EXPECT_EQ(bad_bytes(), 0u);
  EXPECT_FALSE(session_->failure());
  // The same holds for the next daemon's session.
  session_.reset();
  open(/*resume=*/true, /*has_process=*/false);
  EXPECT_EQ(bad_bytes(), 0u);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(eventually([this] { return header().ready == 1; }));
  EXPECT_EQ(header().data_page_count, kDataPages + 1);
  EXPECT_EQ(counter(SourceCounter::kOwnPagesKept), kOwnPages);
}

TEST_F(CloneSource, NorDoesAReadThatIsUnderWayWhenTheyAre) {
  test::Gates gates;
  auto& keep = gates.close(wire::InjectPoint::kSourceKeep);
  open();
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(gates.wait_parked(keep));
  auto& look = gates.close(wire::InjectPoint::kSourceRead, page_key(0, PageIndex{10}));
  auto reading = std::async(std::launch::async, [this] { return read_page(10); });
  ASSERT_TRUE(gates.wait_parked(look));
  gates.open(keep);
  ASSERT_TRUE(is_kept());
  clone_->kill_now();
  gates.open(look);
  const Status read = reading.get();
  EXPECT_TRUE(read.ok()) << read.error().what;
  EXPECT_FALSE(session_->failure());
}

TEST_F(CloneSource, IsLostIfItEndsBeforeThat) {
  Parking parking;
  open();
  parking.arm(wire::InjectPoint::kSourceKeep);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(parking.wait_parked());
  clone_->kill_now();
  EXPECT_FALSE(session_->failure()) << "nobody has missed anything yet";
  const Status own = read_page(10);
  ASSERT_FALSE(own.ok());
  EXPECT_EQ(own.error().code, ErrorCode::kProcessGone);
  ASSERT_TRUE(session_->failure());
  EXPECT_EQ(session_->failure()->code, ErrorCode::kProcessGone);
  parking.release();
  session_.reset();
  EXPECT_FALSE(has_file(own_path_));
  EXPECT_FALSE(has_file(own_path_ + ".part"));
  for (const bool has_process : {true, false}) {
    const auto again = try_open(/*resume=*/true, has_process);
    ASSERT_FALSE(again.ok());
    EXPECT_EQ(again.error().code, ErrorCode::kProcessGone);
  }
}

TEST_F(CloneSource, IsLookedAtAgainByTheNextDaemonIfItsPagesWereNotKept) {
  Parking parking;
  open();
  parking.arm(wire::InjectPoint::kSourceKeep);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(parking.wait_parked());
  auto closing = std::async(std::launch::async, [this] { session_.reset(); });
  // The session first closes its connections, and then waits for the thread that is parked.
  ASSERT_TRUE(eventually([this] { return !book_.session_alive; }));
  parking.release();
  closing.get();
  open(/*resume=*/true);
  EXPECT_EQ(bad_bytes(), 0u);
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(is_kept());
  EXPECT_EQ(bad_bytes(), 0u);
}

TEST_F(CloneSource, WhatAnEarlierMoveHasKeptIsForgotten) {
  open();
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(is_kept());
  session_.reset();
  // That move was undone, and the clone has run on.
  write(10 * kPage, 1);
  write(30 * kPage, 2);
  open();
  EXPECT_FALSE(has_file(own_path_));
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(is_kept());
  EXPECT_EQ(bad_bytes(), 0u);
  EXPECT_EQ(counter(SourceCounter::kOwnPages), kOwnPages + 1);
}

TEST_F(CloneSource, IsServedFromItsProcessWhereItsPagesCannotBeKept) {
  own_path_ = path("nowhere/ram.own");
  open();
  ASSERT_TRUE(session_->scan().ok());
  ASSERT_TRUE(eventually([this] { return session_->failure().has_value(); }));
  EXPECT_NE(session_->failure()->code, ErrorCode::kProcessGone);
  EXPECT_EQ(header().ready, 1u);
  EXPECT_EQ(bad_bytes(), 0u);
}

TEST_F(CloneSource, AFileOfPagesThatIsNotOursIsRefused) {
  const UniqueFd fd(::open(own_path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(fd.get(), kLengthBytes), 0);
  const auto opened = try_open(/*resume=*/true);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code, ErrorCode::kRegionChanged);
}

TEST_F(CloneSource, IsExposedOverTcpAlone) {
  const std::vector<SourceRegionConfig> regions{{image_.path, kLengthBytes, kPage}};
  const SourceCloneConfig clone{listener_->memory(), {own_path_}, false};
  auto shm = transport::kShmProvider.listen({path("data.sock"), 0}, {});
  ASSERT_TRUE(shm.ok());
  EXPECT_FALSE(SourceSession::open(*shm.value(), {}, regions, &clone).ok());
  auto tcp = transport::kTcpProvider.listen({"127.0.0.1", 0}, {});
  ASSERT_TRUE(tcp.ok());
  EXPECT_TRUE(SourceSession::open(*tcp.value(), {}, regions, &clone).ok());
  const SourceCloneConfig none{listener_->memory(), {}, false};
  EXPECT_FALSE(SourceSession::open(*tcp.value(), {}, regions, &none).ok());
}

}  // namespace
}  // namespace vmigrate::pager
