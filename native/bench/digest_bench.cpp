// Measures digests: how fast a root makes them, how fast a move tags pages that are to be verified, and what
// digests cost a host that reads an image from another
// over each transport to compare them. One process is both hosts. Prints one line of JSON for each
// repetition.
//
// digest_bench [MIB [REPETITIONS]]        default: 512 3

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "base/thread_util.hpp"
#include "image/fetch.hpp"
#include "memory/page_tags.hpp"
#include "memory/region.hpp"
#include "source/source.hpp"
#include "transport/registry/registry.hpp"

namespace {

using namespace vmigrate;
using pager::now_ns;
using transport::Channel;

constexpr uint64_t kPage = 4096;

[[noreturn]] void die(const Error& error) {
  std::fprintf(stderr, "digest_bench: %s: %s\n", error.what, std::strerror(error.system_errno));
  std::exit(1);
}
void must(const Status& status) {
  if (!status) die(status.error());
}
template <typename T>
T must(Result<T> result) {
  if (!result) die(result.error());
  return std::move(result).value();
}

class Bench {
 public:
  explicit Bench(uint64_t mib) : length_bytes_(mib << 20) {
    char name[] = "/dev/shm/vmigrate-bench-XXXXXX";
    if (::mkdtemp(name) == nullptr) die(system_error("mkdtemp"));
    dir_ = name;
    must(memory::Region::create_file(dir_ + "/root", length_bytes_, kPage));
    auto root = must(memory::Region::open(dir_ + "/root", length_bytes_, kPage, memory::Mode::kReadWrite));
    for (uint64_t at = 0; at < length_bytes_; at += 8) {
      const uint64_t word = at * 0x9e3779b97f4a7c15ull | 1;
      std::memcpy(root->base() + at, &word, 8);
    }
  }
  ~Bench() {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }

  double make_mb_per_s() {
    std::filesystem::remove(dir_ + "/root.digests");
    made_ = open_digests("root");
    const uint64_t since_ns = now_ns();
    must(made_->make(0, length_bytes_ / kPage));
    return mb_per_s(now_ns() - since_ns);
  }

  double tag_mb_per_s() {
    auto region = must(memory::Region::open(dir_ + "/root", length_bytes_, kPage, memory::Mode::kReadOnly));
    auto tagger = must(memory::PageTagger::create({1}));
    const memory::ReadRegion read = [&](uint64_t at, std::span<std::byte> out) {
      return region->read(at, out);
    };
    std::vector<std::byte> tags(256 * wire::kPageTagBytes);
    const uint64_t since_ns = now_ns();
    for (uint64_t page = 0; page < length_bytes_ / kPage; page += 256)
      must(tagger->tag(0, kPage, {PageIndex{page}, 256}, read, tags));
    return mb_per_s(now_ns() - since_ns);
  }

  /// Reads the whole image; with digests that are known before, or without.
  double fetch_mb_per_s(const char* provider_name, bool has_digests, double& cpu_s) {
    const transport::Provider& provider = *transport::find_provider(provider_name);
    const transport::Address place{provider_name == std::string("shm") ? dir_ + "/socket" : "127.0.0.1", 0};
    auto listener = must(provider.listen(place, {}));
    transport::Credentials credentials;
    const pager::SourceRegionConfig served{dir_ + "/root", length_bytes_, kPage, nullptr};
    auto source = must(pager::SourceSession::open(*listener, credentials, {&served, 1}));
    must(source->scan());
    for (const char* file : {"/leaf", "/leaf.presence", "/leaf.digests"})
      std::filesystem::remove(dir_ + file);
    must(memory::Region::create_file(dir_ + "/leaf", length_bytes_, kPage));
    pager::ImageFetchConfig config;
    config.image = {{dir_ + "/leaf", dir_ + "/leaf.presence", length_bytes_, kPage}};
    if (has_digests) {
      config.digests = open_digests("leaf");
      const auto known = must(made_->read(0, PageIndex{0}, length_bytes_ / kPage));
      must(config.digests->accept(0, PageIndex{0}, known));
    }
    auto fetch = must(pager::ImageFetch::open(std::move(config)));
    pager::SourceEndpoints endpoints;
    for (auto [channel, endpoint] :
         {std::pair{Channel::kDemand, &endpoints.demand}, {Channel::kBulk, &endpoints.bulk}}) {
      *endpoint = must(
          provider.connect(listener->address(), credentials, channel, std::chrono::milliseconds(5000), {}));
    }
    endpoints.keys.assign(source->keys().begin(), source->keys().end());
    must(fetch->connect(std::move(endpoints)));
    const uint64_t since_ns = now_ns();
    must(fetch->start());
    must(fetch->sweep());
    while (fetch->state() == pager::ImageState::kCopying) ::usleep(500);
    const uint64_t took_ns = now_ns() - since_ns;
    if (fetch->state() != pager::ImageState::kComplete) die(*fetch->failure());
    std::array<uint64_t, wire::kImageCounterCount> all{};
    fetch->counters(all);
    cpu_s = static_cast<double>(all[static_cast<size_t>(wire::ImageCounter::kCpuNs)]) / 1e9;
    fetch.reset();
    source.reset();
    return mb_per_s(took_ns);
  }

 private:
  std::shared_ptr<pager::ImageDigests> open_digests(const std::string& name) {
    const pager::DigestRegionConfig config{dir_ + "/" + name, dir_ + "/" + name + ".digests", length_bytes_,
                                           kPage};
    return must(pager::ImageDigests::open({&config, 1}));
  }
  double mb_per_s(uint64_t ns) const {
    return static_cast<double>(length_bytes_) / 1e6 / (static_cast<double>(ns) / 1e9);
  }

  const uint64_t length_bytes_;
  std::string dir_;
  std::shared_ptr<pager::ImageDigests> made_;
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t mib = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 512;
  const uint64_t repetitions = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 3;
  if (mib == 0 || repetitions == 0) {
    std::fprintf(stderr, "usage: digest_bench [MIB [REPETITIONS]]\n");
    return 2;
  }
  Bench bench(mib);
  for (uint64_t i = 0; i < repetitions; ++i) {
    std::printf("{\"mib\": %lu, \"makeMBPerS\": %.0f, \"tagMBPerS\": %.0f", mib, bench.make_mb_per_s(),
                bench.tag_mb_per_s());
    for (const char* provider : {"shm", "tcp"}) {
      for (const bool has_digests : {false, true}) {
        double cpu_s = 0;
        const double rate = bench.fetch_mb_per_s(provider, has_digests, cpu_s);
        std::printf(", \"%s%sMBPerS\": %.0f, \"%s%sCpuS\": %.2f", provider, has_digests ? "Checked" : "",
                    rate, provider, has_digests ? "Checked" : "", cpu_s);
      }
    }
    std::printf("}\n");
    std::fflush(stdout);
  }
}
