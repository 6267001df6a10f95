#include "memory/fill_state.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "memory/region.hpp"
#include "tests/support/temp_dir.hpp"

namespace vmigrate::pager {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kPages = 4;

/// What a process stores of a page before it knows that the bytes are the source's, and dies.
TEST(FillState, BytesOfAClaimThatDiedAreNeverMappedAsAZeroPage) {
  test::TempDir dir;
  const TargetRegionConfig config{.path = dir / "region",
                                  .presence_path = dir / "presence",
                                  .length_bytes = kPages * kPage,
                                  .page_bytes = kPage};
  ASSERT_TRUE(memory::Region::create_file(config.path, config.length_bytes, config.page_bytes).ok());
  {
    auto fill = FillState::open({&config, 1}, /*resume=*/false, [] {});
    ASSERT_TRUE(fill.ok());
    const auto& region = fill.value()->regions()[0];
    for (const uint64_t page : {1, 2}) {
      ASSERT_TRUE(region.presence->claim(PageIndex{page}));
      std::memset(region.file->base() + page * kPage, 0xee, kPage);
    }
    region.presence->publish({PageIndex{2}, 1});
  }
  auto fill = FillState::open({&config, 1}, /*resume=*/true, [] {});
  ASSERT_TRUE(fill.ok());
  const auto& region = fill.value()->regions()[0];
  EXPECT_EQ(region.presence->state(PageIndex{1}), wire::PageState::kAbsent);
  const auto holds = [&](uint64_t page, uint8_t value) {
    const std::byte* bytes = region.file->base() + page * kPage;
    return std::all_of(bytes, bytes + kPage, [&](std::byte byte) { return byte == std::byte{value}; });
  };
  EXPECT_TRUE(holds(1, 0));
  EXPECT_TRUE(holds(2, 0xee));
}

}  // namespace
}  // namespace vmigrate::pager
