#include "target/arrival_tags.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "target/target.hpp"
#include "tests/support/pager_harness.hpp"

namespace vmigrate::pager {
namespace {

using memory::ChunkRequest;
using test::kPage;
using test::PagerHarness;
using wire::TargetCounter;

using Bytes = std::vector<std::byte>;

const memory::TagKey kKey{1, 2, 3};

class Tagged : public ::testing::Test {
 protected:
  explicit Tagged(uint64_t pages = 1100)
      : vm(PagerHarness::Specs{{pages, [](uint64_t page) { return page % 3 != 0; }}}) {
    options.tag_paths = {vm.dir_ / "ram0.tags"};
    options.tag_key = kKey;
  }
  ChunkRequest all() const { return {kKey, 0, 0, memory::chunks_in(vm.regions[0].page_count, kPage)}; }
  /// Of what the source's file holds now.
  Bytes at_source() const {
    const int fd = vm.regions[0].source_fd.get();
    const auto read = [fd](uint64_t at, std::span<std::byte> out) -> Status {
      const ssize_t got = ::pread(fd, out.data(), out.size(), static_cast<off_t>(at));
      return got == static_cast<ssize_t>(out.size()) ? ok() : Status(system_error("pread"));
    };
    return memory::digest_chunks(all(), vm.regions[0].page_count, kPage,
                                 [&](memory::PageTagger& tagger, PageRun run, std::span<std::byte> tags) {
                                   return tagger.tag(0, kPage, run, read, tags);
                                 })
        .value();
  }
  Bytes arrived() const {
    const auto digests =
        memory::digest_arrived_chunks(options.tag_paths[0], vm.regions[0].page_count, kPage, all());
    EXPECT_TRUE(digests.ok());
    return digests.ok() ? digests.value() : Bytes{};
  }
  void flip(uint64_t page) {
    const int fd = vm.regions[0].source_fd.get();
    std::byte byte{};
    ASSERT_EQ(::pread(fd, &byte, 1, static_cast<off_t>(page * kPage + 77)), 1);
    byte ^= std::byte{4};
    ASSERT_EQ(::pwrite(fd, &byte, 1, static_cast<off_t>(page * kPage + 77)), 1);
  }

  PagerHarness vm;
  TargetOptions options;
};

TEST_F(Tagged, WhatHasArrivedIsWhatTheSourceHas) {
  vm.start(true, options);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(arrived(), at_source());
}

TEST_F(Tagged, ABitThatWasFlippedOnTheWayShows) {
  const Bytes right = at_source();
  flip(700);
  vm.start(true, options);
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  const Bytes wrong = arrived();
  for (size_t chunk = 0; chunk < 3; ++chunk) {
    const auto at = static_cast<ptrdiff_t>(chunk * wire::kPageTagBytes);
    EXPECT_EQ(std::equal(right.begin() + at, right.begin() + at + wire::kPageTagBytes, wrong.begin() + at),
              chunk != 1)
        << chunk;
  }
}

// The VM runs while its memory comes. A tag is that of the page as it came, by demand or by prefetch.
TEST_F(Tagged, WhatTheVmWritesToAPageMeanwhileDoesNotCount) {
  vm.start(false, options);
  for (const uint64_t page : {700, 4, 6}) {
    auto reading = vm.touch(0, page);
    ASSERT_TRUE(PagerHarness::arrives(reading));
    reinterpret_cast<uint64_t*>(vm.regions[0].base + page * kPage)[3] = 42;
  }
  vm.finish_maps();
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  for (uint64_t page = 0; page < 1100; ++page)
    reinterpret_cast<uint64_t*>(vm.regions[0].base + page * kPage)[5] = page;
  vm.session->close();
  EXPECT_EQ(arrived(), at_source());
}

TEST_F(Tagged, ThePagesOfAnEarlierProcessKeepTheirTags) {
  vm.start(false, options);
  for (const uint64_t page : {1, 700, 1099}) {
    auto reading = vm.touch(0, page);
    ASSERT_TRUE(PagerHarness::arrives(reading));
  }
  vm.session->close();
  ASSERT_NE(vm.session->state(), TargetState::kComplete);
  // The earlier process had tagged a page that it thought to be data, and was killed.
  std::fill_n(memory::TagFile::reopen(options.tag_paths[0], 1100).value()->tags({PageIndex{3}, 1}).begin(),
              16, std::byte{1});
  vm.finish_maps();
  vm.open(true, options);
  ASSERT_EQ(vm.counter(TargetCounter::kPagesPresent), 3u);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(arrived(), at_source());
}

TEST_F(Tagged, ALostFileOfTagsKeepsNoVmFromItsMemory) {
  vm.map_vm();
  vm.open(false, options);
  vm.session->close();
  ASSERT_EQ(::unlink(options.tag_paths[0].c_str()), 0);
  vm.finish_maps();
  vm.open(true, options);
  ASSERT_TRUE(vm.session->connect(vm.endpoints()).ok());
  ASSERT_TRUE(vm.session->start().ok());
  ASSERT_TRUE(vm.reaches(TargetState::kComplete));
  EXPECT_EQ(vm.bad_pages(), 0u);
  EXPECT_FALSE(memory::digest_arrived_chunks(options.tag_paths[0], 1100, kPage, all()).ok())
      << "and no new file says that all is well";
}

TEST_F(Tagged, WithoutRoomForTagsNoSessionBegins) {
  vm.map_vm();
  options.tag_paths = {vm.dir_ / "none/ram0.tags"};
  auto refused = TargetSession::open(vm.memory, vm.configs(), options, false, [] {});
  ASSERT_FALSE(refused.ok());
  options.tag_paths.clear();
  vm.open(false, options);
}

}  // namespace
}  // namespace vmigrate::pager
