// Digests of an image that another host sends, piece by piece, beside those that this host makes itself.

#include "image/digests/digests.hpp"

#include <sys/stat.h>

#include <cstddef>

#include "memory/page_hasher.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/one_file.hpp"

namespace vmigrate {
namespace {

using pager::ImageDigests;

constexpr uint64_t kPageBytes = 4096, kPageCounts[] = {5, 70};
constexpr size_t kRegions = std::size(kPageCounts), kEventsMax = 16, kDigestBytes = wire::kDigestBytes;

enum class What : uint8_t { kAccept = 0, kMake, kRead, kReopen, kStop };
/// An input is a row of these. The digests of kAccept follow it.
struct Event {
  uint8_t what;
  uint8_t region;
  uint8_t is_far;  ///< `first` is not near the known ones, but anywhere
  int8_t offset;   ///< of `first` from the known ones
  uint64_t first;
  uint64_t length;  ///< bytes of digests, or pages
} __attribute__((packed));

/// The files of the image and of its digests. They stay open: what an input adds is taken back.
struct Files {
  Files() {
    for (size_t i = 0; i < kRegions; ++i) {
      const UniqueFd fd(::open(images[i].path().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
      VMG_CHECK(::ftruncate(fd.get(), static_cast<off_t>(kPageCounts[i] * kPageBytes)) == 0);
      configs.push_back({images[i].path(), digests[i].path(), kPageCounts[i] * kPageBytes, kPageBytes});
    }
    reopen();
    for (size_t i = 0; i < kRegions; ++i) fds[i].reset(::open(digests[i].path().c_str(), O_RDWR | O_CLOEXEC));
  }
  void reopen() {
    image.reset();
    image = ImageDigests::open(configs).value();
  }
  void reset() {
    constexpr off_t kKnownAt = offsetof(wire::DigestsHeader, known_count);
    const uint64_t none = 0;
    for (const UniqueFd& fd : fds) VMG_CHECK(::pwrite(fd.get(), &none, sizeof none, kKnownAt) == sizeof none);
  }

  std::array<fuzz::OneFile, kRegions> images, digests;
  std::array<UniqueFd, kRegions> fds;
  std::vector<pager::DigestRegionConfig> configs;
  std::shared_ptr<ImageDigests> image;
};

class Model {
 public:
  explicit Model(Files& files) : files_(files) { files.reset(); }

  void accept(const Event& event, fuzz::Input& input) {
    // Also more than there is room for.
    const size_t length_bytes = event.length % ((kPageCounts[1] + 2) * kDigestBytes);
    const auto part = input.bytes(length_bytes);
    std::vector<std::byte> digests(part.begin(), part.end());
    digests.resize(length_bytes, std::byte{event.region});
    digests.shrink_to_fit();
    const uint64_t first = first_of(event);
    const Status accepted = files_.image->accept(event.region, PageIndex{first}, digests);
    if (event.region >= kRegions || first != known(event.region)) {
      VMG_CHECK(!accepted && accepted.error().code == ErrorCode::kInvalidArgument);
    } else if (length_bytes % kDigestBytes != 0 ||
               length_bytes / kDigestBytes > kPageCounts[event.region] - known(event.region)) {
      VMG_CHECK(!accepted && accepted.error().code == ErrorCode::kProtocol);
    } else {
      VMG_CHECK(accepted.ok());
      expected_[event.region].insert(expected_[event.region].end(), digests.begin(), digests.end());
    }
    check();
  }

  void make(const Event& event) {
    const uint64_t count = event.is_far != 0 ? event.length : event.length % 4;
    const Status made = files_.image->make(event.region, count);
    if (event.region >= kRegions || count > kPageCounts[event.region] - known(event.region)) {
      VMG_CHECK(!made && made.error().code == ErrorCode::kInvalidArgument);
    } else if (is_stopped_ && count != 0) {
      VMG_CHECK(!made && made.error().code == ErrorCode::kClosed);
    } else {
      VMG_CHECK(made.ok());
      const memory::Digest zeros = *memory::digest_of_zeros(kPageBytes);
      for (uint64_t i = 0; i < count; ++i)
        expected_[event.region].insert(expected_[event.region].end(), zeros.begin(), zeros.end());
    }
    check();
  }

  void read(const Event& event) const {
    const uint64_t first = first_of(event);
    const auto got = files_.image->read(event.region, PageIndex{first}, event.length);
    const bool is_known = event.region < kRegions && first <= known(event.region) &&
                          event.length <= known(event.region) - first;
    VMG_CHECK(got.ok() == is_known);
    VMG_CHECK(is_known || got.error().code == ErrorCode::kInvalidArgument);
    if (is_known)
      VMG_CHECK(fuzz::same(
          got.value(),
          std::span(expected_[event.region]).subspan(first * kDigestBytes, event.length * kDigestBytes)));
  }

  void reopen() {
    files_.reopen();
    is_stopped_ = false;
    check();
  }
  void stop() {
    files_.image->stop();
    is_stopped_ = true;
  }
  bool is_stopped() const { return is_stopped_; }

 private:
  uint64_t known(uint8_t region) const { return expected_[region].size() / kDigestBytes; }
  uint64_t first_of(const Event& event) const {
    if (event.is_far != 0 || event.region >= kRegions) return event.first;
    return known(event.region) + static_cast<uint64_t>(int64_t{event.offset});
  }
  void check() const {
    for (uint8_t region = 0; region < kRegions; ++region) {
      VMG_CHECK(files_.image->known(region).value() == known(region));
      const memory::DigestMap& map = files_.image->map(region);
      VMG_CHECK(map.page_count() == kPageCounts[region]);
      VMG_CHECK(fuzz::same(map.digests({PageIndex{0}, known(region)}), expected_[region]));
    }
    VMG_CHECK(files_.image->known(kRegions).error().code == ErrorCode::kInvalidArgument);
  }

  Files& files_;
  std::array<std::vector<std::byte>, kRegions> expected_;
  bool is_stopped_ = false;
};

Event event_of(What what, uint8_t region, int8_t offset = 0, uint64_t length = 0) {
  return {static_cast<uint8_t>(what), region, 0, offset, 0, length};
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  const Event reopen = event_of(What::kReopen, 0);
  for (uint8_t region = 0; region < 3; ++region) {
    for (const uint64_t length : {0, 1, 16, 32, 80, 96, 1120, 1136}) {
      const Event accept = event_of(What::kAccept, region, 0, length);
      all.push_back(Seed().add(accept).fill(length, 9).add(reopen).add(accept).fill(length, 8));
    }
    for (const int8_t offset : {-1, 1})
      all.push_back(Seed()
                        .add(event_of(What::kAccept, region, 0, 32))
                        .fill(32, 7)
                        .add(event_of(What::kAccept, region, offset, 16))
                        .fill(16, 6)
                        .add(event_of(What::kRead, region, offset, 1)));
    Event far = event_of(What::kRead, region, 0, ~uint64_t{0});
    far.is_far = far.first = 1;
    all.push_back(Seed().add(event_of(What::kAccept, region, 0, 48)).fill(48, 1).add(far));
    far.what = static_cast<uint8_t>(What::kMake);
    all.push_back(Seed().add(event_of(What::kMake, region, 0, 3)).add(far).add(reopen));
    all.push_back(Seed().add(event_of(What::kStop, 0)).add(event_of(What::kMake, region, 0, 2)).add(reopen));
  }
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static Files files;
  fuzz::Input input(bytes, length_bytes);
  Model model(files);
  for (size_t i = 0; i < kEventsMax && !input.empty(); ++i) {
    const auto event = input.take<Event>();
    switch (static_cast<What>(event.what % 5)) {
      case What::kAccept:
        model.accept(event, input);
        break;
      case What::kMake:
        model.make(event);
        break;
      case What::kRead:
        model.read(event);
        break;
      case What::kReopen:
        model.reopen();
        break;
      case What::kStop:
        model.stop();
        break;
    }
  }
  if (model.is_stopped()) model.reopen();
  return 0;
}
