// Measures an image of a process that writes: how long the process is stopped, how long it is slowed down,
// how long the copy takes. One thread writes to random pages and counts; the fork point stops it as QEMU
// stops a VM. Prints one line of JSON for each memory size.
//
// image_bench [MIB...]        default: 256 2048

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>
#include <vector>

#include "base/thread_util.hpp"
#include "image/capture.hpp"
#include "memory/region.hpp"

namespace {

using namespace vmigrate;
using pager::now_ns;
using wire::ImageCounter;

constexpr uint64_t kPage = 4096;
constexpr uint64_t kWindowNs = 20'000'000;
/// One window means little if other processes use the processors too.
constexpr size_t kWindowsOfMean = 10;
constexpr size_t kWindowsAfter = 100;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "image_bench: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

void must(const Status& status, const char* what) {
  if (status.ok()) return;
  errno = status.error().system_errno;
  die(what);
}

/// Reads four pages of five and writes the fifth, all at random, like the guests of docs/BENCHMARKS.md.
class Guest {
 public:
  Guest(std::byte* base, uint64_t page_count) : base_(base), page_count_(page_count) {
    thread_ = std::thread([this] { run(); });
  }
  ~Guest() {
    is_ended_ = true;
    thread_.join();
  }
  void stop() {
    is_stopped_ = true;
    while (!is_still_) std::this_thread::yield();
  }
  void go_on() { is_stopped_ = false; }
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }

 private:
  void run() {
    std::minstd_rand random(1);
    uint64_t sum = 0;
    while (!is_ended_) {
      for (int i = 0; i < 20; ++i) {
        auto* word = reinterpret_cast<volatile uint64_t*>(base_ + random() % page_count_ * kPage);
        if (i % 5 == 0) {
          *word = sum;
        } else {
          sum += *word;
        }
      }
      count_.fetch_add(20, std::memory_order_relaxed);
      if (!is_stopped_) continue;
      is_still_ = true;
      while (is_stopped_ && !is_ended_) std::this_thread::yield();
      is_still_ = false;
    }
  }
  std::byte* const base_;
  const uint64_t page_count_;
  std::atomic<uint64_t> count_{0};
  std::atomic<bool> is_ended_{false}, is_stopped_{false}, is_still_{false};
  std::thread thread_;
};

/// The time when the guest was back at 90 % of its speed: from there on it ran at that speed in the mean of
/// 200 ms.
uint64_t back_after_ns(const std::vector<double>& shares) {
  for (size_t first = 0; first + kWindowsOfMean <= shares.size(); ++first) {
    double sum = 0;
    for (size_t i = first; i < first + kWindowsOfMean; ++i) sum += shares[i];
    if (sum / kWindowsOfMean >= 0.9) return first * kWindowNs;
  }
  return shares.size() * kWindowNs;
}

int open_userfaultfd() {
  const int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | (1 << 12) | (1 << 13);
  if (fd < 0 || ::ioctl(fd, UFFDIO_API, &api) != 0) die("userfaultfd with write-protection of shared memory");
  return fd;
}

void measure(uint64_t mib) {
  const uint64_t length_bytes = mib << 20;
  char dir[] = "/dev/shm/vmigrate-bench-XXXXXX";
  if (::mkdtemp(dir) == nullptr) die("mkdtemp");
  const std::string path = dir;
  must(memory::Region::create_file(path + "/ram", length_bytes, kPage), "create ram");
  must(memory::Region::create_file(path + "/image", length_bytes, kPage), "create image");
  const UniqueFd fd(::open((path + "/ram").c_str(), O_RDWR | O_CLOEXEC));
  void* mapped = ::mmap(nullptr, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) die("mmap");
  std::memset(mapped, 7, length_bytes);
  pager::VmMemory vm;
  vm.pid = ::getpid();
  vm.descriptors.push_back({UniqueFd(open_userfaultfd()), -1, wire::PreloadDescriptor::kSync});
  vm.ranges.push_back({0, 0, length_bytes, HostAddr{reinterpret_cast<uint64_t>(mapped)}, 0});

  pager::ImageConfig config;
  config.parent = &vm;
  config.source = {{path + "/ram", length_bytes, kPage}};
  config.image = {{path + "/image", path + "/presence", length_bytes, kPage}};
  auto opened = pager::ImageCapture::open(std::move(config));
  if (!opened) die("open capture");
  auto& capture = *opened.value();

  {
    Guest guest(static_cast<std::byte*>(mapped), length_bytes / kPage);
    const auto sleep_window = [] { std::this_thread::sleep_for(std::chrono::nanoseconds(kWindowNs)); };
    sleep_window();
    const uint64_t before = guest.count();
    for (int i = 0; i < 20; ++i) sleep_window();
    const double rate = static_cast<double>(guest.count() - before) / 20;

    must(capture.arm(), "arm");
    // The time that QEMU takes from the begin of the migration until it has stopped.
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    guest.stop();
    const uint64_t stopped_ns = now_ns();
    must(capture.protect(), "protect");
    must(capture.seal(), "seal");
    const uint64_t sealed_ns = now_ns();
    guest.go_on();
    std::vector<double> shares;
    uint64_t at_count = guest.count();
    for (size_t after = 0; after < kWindowsAfter && now_ns() - sealed_ns < 20'000'000'000;) {
      sleep_window();
      shares.push_back(static_cast<double>(guest.count() - at_count) / rate);
      at_count = guest.count();
      if (capture.state() == pager::ImageState::kComplete) ++after;
    }
    if (capture.state() != pager::ImageState::kComplete) die("not complete after 20 s");
    std::array<uint64_t, wire::kImageCounterCount> all{};
    capture.counters(all);
    const auto get = [&](ImageCounter counter) { return all[static_cast<size_t>(counter)]; };
    const auto ms = [](uint64_t ns) { return static_cast<double>(ns) / 1e6; };
    std::printf(
        "{\"mib\": %lu, \"armMs\": %.1f, \"pauseMs\": %.2f, \"protectMs\": %.2f, \"sealMs\": %.2f, "
        "\"rearmedPages\": %lu, \"notedFaults\": %lu, \"copyMs\": %.0f, \"backMs\": %.0f, \"faults\": %lu, "
        "\"faultP50Us\": %.0f, \"faultP99Us\": %.0f, \"faultMaxUs\": %.0f, \"cpuMs\": %.0f, "
        "\"guestOpsPerS\": "
        "%.0f}\n",
        mib, ms(get(ImageCounter::kArmNs)), ms(sealed_ns - stopped_ns), ms(get(ImageCounter::kProtectNs)),
        ms(get(ImageCounter::kSealNs)), get(ImageCounter::kRearmedPages), get(ImageCounter::kNotedFaultCount),
        ms(get(ImageCounter::kCopyNs)), ms(back_after_ns(shares)), get(ImageCounter::kParentFaultCount),
        ms(get(ImageCounter::kParentFaultP50Ns)) * 1000, ms(get(ImageCounter::kParentFaultP99Ns)) * 1000,
        ms(get(ImageCounter::kParentFaultMaxNs)) * 1000, ms(get(ImageCounter::kCpuNs)),
        rate * 1e9 / kWindowNs);
    std::fflush(stdout);
  }
  capture.close();
  ::munmap(mapped, length_bytes);
  std::error_code ignored;
  std::filesystem::remove_all(path, ignored);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<uint64_t> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(std::strtoull(argv[i], nullptr, 10));
  if (sizes.empty()) sizes = {256, 2048};
  for (const uint64_t mib : sizes) {
    if (mib == 0) {
      std::fprintf(stderr, "usage: image_bench [MIB...]\n");
      return 2;
    }
    measure(mib);
  }
}
