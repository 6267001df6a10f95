// A file of page states, as an earlier process, a crash or somebody else has left it.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/presence_map.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/one_file.hpp"

namespace vmigrate {
namespace {

using memory::PresenceMap;
using wire::PageState;

constexpr uint64_t kPageBytes = 4096;

/// An input: the pages that are expected, the head of the file, what fills the rest of the head, and states.
struct Settings {
  uint8_t page_count;
  wire::PresenceHeader header;
} __attribute__((packed));

bool is_right(const Settings& settings, uint64_t page_count, std::span<const std::byte> states) {
  const wire::PresenceHeader& header = settings.header;
  return states.size() == page_count && header.magic == wire::kPresenceMagic &&
         header.version == wire::kPresenceVersion && header.page_bytes == kPageBytes &&
         header.page_count == page_count &&
         std::all_of(states.begin(), states.end(), [](std::byte state) { return state <= std::byte{3}; });
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (const uint8_t count : {1, 5, 64}) {
    const Settings settings{count, {wire::kPresenceMagic, wire::kPresenceVersion, kPageBytes, count, {}}};
    for (uint8_t state = 0; state < 5; ++state) all.push_back(Seed().add(settings).fill(count, state));
    all.push_back(Seed().add(settings).fill(count - 1, 2));
    all.push_back(Seed().add(settings).fill(count + 1, 2));
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const fuzz::OneFile file;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const auto states = input.rest();
  file.write(settings.header, wire::kPresenceHeaderBytes, states);
  const uint64_t page_count = std::max<uint64_t>(1, settings.page_count);
  {
    std::vector<bool> wiped(page_count);
    const auto wipe = [&](PageRun run) {
      for (uint64_t page = 0; page < run.count; ++page) wiped.at(raw(run.first) + page) = true;
      return ok();
    };
    const auto map = PresenceMap::reopen(file.path(), page_count, kPageBytes, wipe);
    VMG_CHECK(map.ok() == is_right(settings, page_count, states));
    if (!map) {
      VMG_CHECK(map.error().code == ErrorCode::kCorrupt);
      // A file that is refused may still be somebody's: only claims of a dead process are taken back.
      return 0;
    }
    for (uint64_t page = 0; page < page_count; ++page) {
      const auto was = static_cast<PageState>(states[page]);
      const PageState expected = was == PageState::kClaimed ? PageState::kAbsent : was;
      VMG_CHECK(map.value()->state(PageIndex{page}) == expected);
      VMG_CHECK(wiped[page] == (was == PageState::kClaimed));
      VMG_CHECK(map.value()->claim(PageIndex{page}) == (expected == PageState::kAbsent));
    }
  }
  // What was claimed by the process that has ended is absent for the next one.
  const auto again = PresenceMap::reopen(file.path(), page_count, kPageBytes, [](PageRun) { return ok(); });
  VMG_CHECK(again.ok());
  for (uint64_t page = 0; page < page_count; ++page)
    VMG_CHECK(again.value()->state(PageIndex{page}) != PageState::kClaimed);
  return 0;
}
