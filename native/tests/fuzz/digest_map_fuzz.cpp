// A file of digests, as an earlier process or somebody else has left it, and digests that another host sends.

#include <unistd.h>

#include "memory/digest_map.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/one_file.hpp"

namespace vmigrate {
namespace {

using memory::DigestMap;

constexpr uint64_t kPageBytes = 4096;

/// How an input begins; the digests of the file follow.
struct Settings {
  uint8_t page_count;
  wire::DigestsHeader header;
} __attribute__((packed));

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (const uint8_t count : {1, 3, 40}) {
    for (const uint64_t known : {0, 1, 3, 40, 41}) {
      const Settings settings{count,
                              {wire::kDigestsMagic, wire::kDigestsVersion, kPageBytes, count, known, {}}};
      all.push_back(Seed().add(settings).fill(size_t{count} * wire::kDigestBytes, 9));
      all.push_back(Seed().add(settings).fill(size_t{count} * wire::kDigestBytes - 1, 9));
    }
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const fuzz::OneFile file;
  fuzz::Input input(bytes, length_bytes);
  const auto settings = input.take<Settings>();
  const auto digests = input.rest();
  file.write(settings.header, wire::kDigestsHeaderBytes, digests);
  const uint64_t page_count = std::max<uint64_t>(1, settings.page_count);
  const auto [magic, version, page_bytes, pages, known, reserved] = settings.header;
  const bool is_right = magic == wire::kDigestsMagic && version == wire::kDigestsVersion &&
                        page_bytes == kPageBytes && pages == page_count && known <= page_count &&
                        digests.size() == page_count * wire::kDigestBytes;
  const uint64_t expected = is_right ? known : 0;
  std::vector<std::byte> rest((page_count - expected) * wire::kDigestBytes, std::byte{7});
  {
    const auto map = DigestMap::open_or_create(file.path(), page_count, kPageBytes);
    VMG_CHECK(map.ok() && map.value()->known() == expected && map.value()->page_count() == page_count);
    const size_t known_bytes = expected * wire::kDigestBytes;
    VMG_CHECK(fuzz::same(map.value()->digests({PageIndex{0}, expected}), digests.first(known_bytes)));
    map.value()->append(rest);
  }
  const auto again = DigestMap::open_or_create(file.path(), page_count, kPageBytes);
  VMG_CHECK(again.ok() && again.value()->known() == page_count);
  VMG_CHECK(fuzz::same(again.value()->digests({PageIndex{expected}, page_count - expected}), rest));
  return 0;
}
