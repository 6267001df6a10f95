#include "fetch/fetch_table.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "tests/support/fake_endpoint.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::pager {
namespace {

using Progress = FetchTable::Progress;
using transport::OpResult;

constexpr uint64_t kPageBytes = 2 << 20, kLengthBytes = 4 * kPageBytes;

/// Pages that take two operations each.
class FetchTableTest : public ::testing::Test {
 protected:
  FetchTableTest() {
    const std::string path = dir / "ram";
    EXPECT_TRUE(memory::Region::create_file(path, kLengthBytes, kPageBytes).ok());
    const TargetRegionConfig config{path, dir / "presence", kLengthBytes, kPageBytes};
    auto opened = FillState::open({&config, 1}, false, [] {});
    EXPECT_TRUE(opened.ok());
    fill = std::move(opened).value();
    link.endpoint = std::make_unique<test::FakeEndpoint>(source, control);
    link.keys.push_back({source.expose(fill->region(0).file->fd(), kLengthBytes), {}});
    EXPECT_TRUE(register_regions(link, *fill).ok());
    table.emplace(*fill, bytes, 4);
  }
  std::vector<FetchTable::Completed> poll() {
    std::array<transport::Completion, 8> completions;
    const size_t count = link.endpoint->poll(completions);
    std::vector<FetchTable::Completed> done;
    for (size_t i = 0; i < count; ++i) done.push_back(table->complete(completions[i]));
    return done;
  }

  test::TempDir dir;
  std::unique_ptr<FillState> fill;
  test::FakeSource source;
  std::shared_ptr<test::FakeControl> control = std::make_shared<test::FakeControl>();
  Link link;
  std::atomic<uint64_t> bytes{0};
  std::optional<FetchTable> table;
};

/// The other operation may still write into the page.
TEST_F(FetchTableTest, IsAbsentWhenNoOperationIsOutstandingAnyMore) {
  control->result = [](const transport::Operation& op) {
    return op.remote_offset_bytes == 0 ? OpResult::kAbsent : OpResult::kOk;
  };
  control->hold_if([](const transport::Operation& op) { return op.remote_offset_bytes != 0; });
  table->start(0, {PageIndex{0}, 1});
  ASSERT_TRUE(table->post(link));
  auto done = poll();
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].progress, Progress::kMore);
  control->release_all();
  done = poll();
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].progress, Progress::kAbsent);
  EXPECT_EQ(done[0].error.code, ErrorCode::kProtocol);
  table->release(done[0].slot);
  EXPECT_EQ(bytes, 0u);
}

TEST_F(FetchTableTest, WhatWasNotPostedOfAnAbsentPageNeverIs) {
  control->capacity = 1;
  control->fail_with(OpResult::kAbsent);
  table->start(0, {PageIndex{0}, 1});
  table->start(0, {PageIndex{1}, 1});
  ASSERT_TRUE(table->post(link));
  auto done = poll();
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].progress, Progress::kAbsent);
  table->release(done[0].slot);
  // The next fetch follows.
  control->fail_with(OpResult::kOk);
  control->capacity = 8;
  ASSERT_TRUE(table->post(link));
  EXPECT_FALSE(table->has_unposted());
  done = poll();
  ASSERT_EQ(done.size(), 2u);
  EXPECT_EQ(done[1].progress, Progress::kFinished);
  EXPECT_EQ(raw(table->get(done[1].slot).run.first), 1u);
  EXPECT_EQ(control->posted_count, 3u);
  EXPECT_EQ(bytes, kPageBytes);
}

TEST_F(FetchTableTest, GivesUpWhatItHas) {
  control->hold_all();
  for (uint64_t page = 0; page < 3; ++page) table->start(0, {PageIndex{page}, 1});
  ASSERT_TRUE(table->post(link));
  std::vector<uint64_t> pages;
  table->drain([&](uint32_t, PageRun run) { pages.push_back(raw(run.first)); });
  EXPECT_EQ(pages, (std::vector<uint64_t>{0, 1, 2}));
  EXPECT_EQ(table->used_count(), 0u);
  EXPECT_EQ(table->bytes(), 0u);
  EXPECT_FALSE(table->has_unposted());
  // Answers to what was given up are those of nobody.
  control->release_all();
  for (const auto& done : poll()) EXPECT_EQ(done.progress, Progress::kFailed);
}

}  // namespace
}  // namespace vmigrate::pager
