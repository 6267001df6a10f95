// Tests how pages are cut into parts, and put together again from parts that are lost, repeated or
// disordered.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "multicast/assembler.hpp"
#include "multicast/datagram/cut.hpp"
#include "multicast/datagram/sequence_window.hpp"

namespace vmigrate::multicast {
namespace {

constexpr uint64_t kGrain = wire::kDatagramGrainBytes;

/// Keeps what it is given.
class KeepingSink final : public PageSink {
 public:
  uint64_t page_count(uint32_t region) const override { return region < 2 ? 100 : 0; }
  bool wants(uint32_t region, PageIndex page) const override {
    return !pages.contains(pager::page_key(region, page)) && !is_full;
  }
  void take(uint32_t region, PageIndex page, std::span<const std::byte> bytes) override {
    EXPECT_EQ(bytes.size(), kPageBytes);
    EXPECT_TRUE(pages.emplace(pager::page_key(region, page), std::vector(bytes.begin(), bytes.end())).second);
  }
  size_t wanted(std::span<uint64_t>) override { return 0; }
  bool must_end() const override { return false; }

  std::map<pager::PageKey, std::vector<std::byte>> pages;
  bool is_full = false;
};

std::vector<std::byte> page_of(uint32_t region, uint64_t page) {
  std::mt19937 random(static_cast<uint32_t>(region * 1000 + page));
  std::vector<std::byte> bytes(kPageBytes);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

TEST(Cut, EveryPageIsCutIntoPartsThatFit) {
  for (size_t datagram_bytes = 0; datagram_bytes < 9100; ++datagram_bytes) {
    const Cut cut = cut_page(datagram_bytes);
    if (datagram_bytes < wire::kDatagramHeaderBytes + kGrain) {
      EXPECT_EQ(cut.part_count, 0u);
      continue;
    }
    uint64_t covered = 0;
    for (uint32_t part = 0; part < cut.part_count; ++part) {
      ASSERT_LE(wire::kDatagramHeaderBytes + cut.part_bytes(part), datagram_bytes);
      ASSERT_GT(cut.part_bytes(part), 0u);
      ASSERT_EQ(cut.part_bytes(part) % kGrain, 0u);
      ASSERT_EQ(cut.offset_bytes(part), covered) << "a gap, or bytes that are sent twice";
      covered += cut.part_bytes(part);
    }
    ASSERT_EQ(covered, kPageBytes);
  }
  EXPECT_EQ(cut_page(1472).part_count, 3u);
  EXPECT_EQ(cut_page(8972).part_count, 1u);
  EXPECT_EQ(cut_page(65507).part_bytes(0), kPageBytes);
}

TEST(Assembler, TakesAPageWholeOrInParts) {
  KeepingSink sink;
  Assembler assembler(sink);
  const auto whole = page_of(0, 1), parted = page_of(1, 2);
  EXPECT_TRUE(assembler.add(0, kPageBytes, whole));
  EXPECT_EQ(sink.pages.size(), 1u);
  const Cut cut = cut_page(1472);
  for (const uint32_t part : {2u, 0u, 0u, 1u}) {
    EXPECT_EQ(sink.pages.size(), 1u);
    EXPECT_TRUE(assembler.add(1, 2 * kPageBytes + cut.offset_bytes(part),
                              std::span(parted).subspan(cut.offset_bytes(part), cut.part_bytes(part))));
  }
  EXPECT_EQ(sink.pages.at(pager::page_key(0, PageIndex{1})), whole);
  EXPECT_EQ(sink.pages.at(pager::page_key(1, PageIndex{2})), parted);
}

TEST(Assembler, RefusesWhatIsInNoPage) {
  KeepingSink sink;
  Assembler assembler(sink);
  const std::vector<std::byte> bytes(kPageBytes + kGrain);
  const auto add = [&](uint32_t region, uint64_t offset, size_t length) {
    return assembler.add(region, offset, std::span(bytes).first(length));
  };
  EXPECT_FALSE(add(2, 0, kPageBytes)) << "no such region";
  EXPECT_FALSE(add(0xffff, 0, kPageBytes));
  EXPECT_FALSE(add(0, 100 * kPageBytes, kPageBytes)) << "behind the end";
  EXPECT_FALSE(add(0, ~uint64_t{0} - kPageBytes + 1, kPageBytes)) << "the last page of all";
  EXPECT_FALSE(add(0, ~uint64_t{63}, kGrain));
  EXPECT_FALSE(add(0, 0, 0));
  EXPECT_FALSE(add(0, 0, 63));
  EXPECT_FALSE(add(0, 32, kGrain)) << "between grains";
  EXPECT_FALSE(add(0, kGrain, kPageBytes)) << "across two pages";
  EXPECT_FALSE(add(0, 0, kPageBytes + kGrain));
  EXPECT_TRUE(add(0, 99 * kPageBytes, kPageBytes));
  EXPECT_EQ(sink.pages.size(), 1u);
}

TEST(Assembler, KeepsNoPlaceForWhatIsHere) {
  KeepingSink sink;
  Assembler assembler(sink);
  sink.is_full = true;
  const auto page = page_of(0, 0);
  for (uint64_t i = 0; i < 100; ++i)
    EXPECT_TRUE(assembler.add(0, i * kPageBytes, std::span(page).first(kGrain)));
  EXPECT_EQ(assembler.evicted_pages(), 0u);
}

TEST(Assembler, GivesUpThePageThatHasWaitedLongest) {
  KeepingSink sink;
  Assembler assembler(sink);
  const auto half = [&](uint64_t number, bool is_second) {
    const auto bytes = page_of(0, number);
    EXPECT_TRUE(assembler.add(0, number * kPageBytes + (is_second ? kPageBytes / 2 : 0),
                              std::span(bytes).subspan(is_second ? kPageBytes / 2 : 0, kPageBytes / 2)));
  };
  for (uint64_t page = 0; page <= kStagedPagesMax; ++page) half(page, false);
  EXPECT_EQ(assembler.evicted_pages(), 1u);
  half(0, true);  // it is forgotten, so this half is the only one; it takes the place of page 1
  half(1, true);
  EXPECT_TRUE(sink.pages.empty());
  EXPECT_EQ(assembler.evicted_pages(), 3u);
  for (uint64_t page = 4; page <= kStagedPagesMax; ++page) half(page, true);
  EXPECT_EQ(sink.pages.size(), kStagedPagesMax - 3);
  for (const auto& [key, bytes] : sink.pages) EXPECT_EQ(bytes, page_of(0, raw(pager::key_page(key))));
}

/// Every page that comes is right, and every page comes of which all parts do.
TEST(Assembler, PutsTogetherWhatALossyNetworkBrings) {
  std::vector<std::vector<std::byte>> pages;
  for (uint64_t page = 0; page < 100; ++page) pages.push_back(page_of(0, page));
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    KeepingSink sink;
    Assembler assembler(sink);
    const Cut cut = cut_page(200 + random() % 4000);
    struct Part {
      uint64_t page;
      uint32_t part;
      double order;
    };
    std::vector<Part> parts;
    std::map<uint64_t, bool> is_whole;
    const double reach = 1 + random() % 30;  // pages that a part may be overtaken by
    for (uint64_t page = 0; page < 100; ++page) {
      is_whole[page] = true;
      for (uint32_t part = 0; part < cut.part_count; ++part) {
        const bool is_lost = random() % 20 == 0;
        is_whole[page] &= !is_lost;
        if (is_lost) continue;
        const int copies = random() % 10 == 0 ? 2 : 1;
        for (int copy = 0; copy < copies; ++copy)
          parts.push_back({page, part, static_cast<double>(page) + reach * (random() % 1000) / 1000.0});
      }
    }
    std::stable_sort(parts.begin(), parts.end(),
                     [](const Part& a, const Part& b) { return a.order < b.order; });
    for (const Part& part : parts) {
      const auto& bytes = pages[part.page];
      ASSERT_TRUE(
          assembler.add(0, part.page * kPageBytes + cut.offset_bytes(part.part),
                        std::span(bytes).subspan(cut.offset_bytes(part.part), cut.part_bytes(part.part))));
    }
    for (const auto& [key, bytes] : sink.pages) ASSERT_EQ(bytes, pages[raw(pager::key_page(key))]);
    if (assembler.evicted_pages() != 0) continue;
    for (const auto& [page, whole] : is_whole)
      ASSERT_TRUE(!whole || sink.pages.contains(pager::page_key(0, PageIndex{page}))) << seed << " " << page;
  }
}

TEST(SequenceWindow, KnowsWhatItHasSeen) {
  SequenceWindow window;
  EXPECT_TRUE(window.note(1));
  EXPECT_FALSE(window.note(1));
  EXPECT_TRUE(window.note(3));
  EXPECT_TRUE(window.note(2));
  EXPECT_FALSE(window.note(3));
  EXPECT_EQ(window.highest(), 3u);
  EXPECT_TRUE(window.note(3 + kReorderedMax));
  EXPECT_FALSE(window.note(3)) << "too old to tell";
  EXPECT_TRUE(window.note(4 + 5));
  EXPECT_FALSE(window.note(4 + 5));
  EXPECT_TRUE(window.note(~uint64_t{0} - 2));
  EXPECT_TRUE(window.note(~uint64_t{0}));
  EXPECT_TRUE(window.note(~uint64_t{0} - 1));
  EXPECT_FALSE(window.note(~uint64_t{0} - 1));
}

TEST(SequenceWindow, CountsEachOnceInAnyOrder) {
  std::mt19937 random(7);
  SequenceWindow window;
  std::vector<uint64_t> all;
  for (uint64_t sequence = 1; sequence <= 50'000; ++sequence) {
    if (random() % 10 != 0) all.push_back(sequence);
    if (random() % 10 == 0) all.push_back(sequence);
  }
  // Each moves by less than the window.
  for (size_t i = 0; i + 2000 < all.size(); i += 2000)
    std::shuffle(all.begin() + static_cast<std::ptrdiff_t>(i),
                 all.begin() + static_cast<std::ptrdiff_t>(i + 2000), random);
  std::map<uint64_t, bool> seen;
  for (const uint64_t sequence : all) {
    ASSERT_EQ(window.note(sequence), !seen[sequence]) << sequence;
    seen[sequence] = true;
  }
}

}  // namespace
}  // namespace vmigrate::multicast
