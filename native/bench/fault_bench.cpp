// Fault to CONTINUE: TargetSession over shm against a bare userfaultfd handler that does one memcpy and one
// CONTINUE. The same thread plays the vCPU in both: it touches pages of a freshly registered mapping in
// random order and times each touch. Rounds are interleaved; the medians of the rounds' medians are compared.
// Prints one line of JSON.
//
//   fault_bench [ROUNDS] [PAGES]

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>
#include <vector>

#include "base/thread_util.hpp"
#include "memory/region.hpp"
#include "source/source.hpp"
#include "target/target.hpp"
#include "transport/shm/provider.hpp"
#include "uffd/uffd.hpp"

namespace {

using namespace vmigrate;

constexpr uint64_t kPage = 4096;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "fault_bench: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

template <typename T>
T must(Result<T> result, const char* what) {
  if (!result.ok()) {
    errno = result.error().system_errno;
    die(what);
  }
  return std::move(result).value();
}

/// A file of random-looking data, and an empty one of the same length.
struct Files {
  explicit Files(uint64_t page_count) : length_bytes(page_count * kPage) {
    char name[] = "/dev/shm/vmigrate-bench-XXXXXX";
    if (::mkdtemp(name) == nullptr) die("mkdtemp");
    dir = name;
    if (!memory::Region::create_file(source(), length_bytes, kPage).ok()) die("create source");
    auto region =
        must(memory::Region::open(source(), length_bytes, kPage, memory::Mode::kReadWrite), "source");
    for (uint64_t i = 0; i < length_bytes / 8; ++i) reinterpret_cast<uint64_t*>(region->base())[i] = i | 1;
  }
  ~Files() {
    std::error_code ignored;
    std::filesystem::remove_all(dir, ignored);
  }
  std::string source() const { return dir + "/source"; }
  std::string target() const { return dir + "/target"; }
  void fresh_target() const {
    ::unlink(target().c_str());
    if (!memory::Region::create_file(target(), length_bytes, kPage).ok()) die("create target");
  }
  uint64_t length_bytes;
  std::string dir;
};

/// The VM's mapping of the target file, registered.
struct Vm {
  explicit Vm(const Files& files) : length_bytes(files.length_bytes) {
    uffd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
    if (uffd < 0 || ::ioctl(uffd, UFFDIO_API, &api) != 0) die("userfaultfd");
    const UniqueFd fd(::open(files.target().c_str(), O_RDWR | O_CLOEXEC));
    void* mapping = ::mmap(nullptr, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (mapping == MAP_FAILED) die("mmap");
    base = static_cast<std::byte*>(mapping);
    if (uffd::register_range(
            uffd, address(0), length_bytes,
            static_cast<uint64_t>(uffd::Mode::kMissing) | static_cast<uint64_t>(uffd::Mode::kMinor))
            .outcome != uffd::Outcome::kDone) {
      die("register");
    }
  }
  ~Vm() { ::munmap(base, length_bytes); }
  HostAddr address(uint64_t offset_bytes) const {
    return HostAddr{reinterpret_cast<uint64_t>(base) + offset_bytes};
  }
  uint64_t length_bytes;
  std::byte* base = nullptr;
  int uffd = -1;
};

/// Touches every page once and returns the median time of a touch.
uint64_t touch_all(const Vm& vm, const std::vector<uint64_t>& order) {
  std::vector<uint64_t> times;
  times.reserve(order.size());
  for (const uint64_t page : order) {
    const uint64_t begin_ns = pager::now_ns();
    const uint64_t word = *reinterpret_cast<const volatile uint64_t*>(vm.base + page * kPage);
    times.push_back(pager::now_ns() - begin_ns);
    if (word != (page * (kPage / 8) | 1)) die("wrong bytes");
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

uint64_t bare_round(const Files& files, const std::vector<uint64_t>& order) {
  files.fresh_target();
  auto source =
      must(memory::Region::open(files.source(), files.length_bytes, kPage, memory::Mode::kReadOnly), "open");
  auto target =
      must(memory::Region::open(files.target(), files.length_bytes, kPage, memory::Mode::kReadWrite), "open");
  const Vm vm(files);
  std::thread handler([&] {
    for (uint64_t served = 0; served < order.size();) {
      pollfd waiting{.fd = vm.uffd, .events = POLLIN, .revents = 0};
      ::poll(&waiting, 1, -1);
      uffd_msg event;
      if (::read(vm.uffd, &event, sizeof(event)) != sizeof(event)) continue;
      const uint64_t offset = (event.arg.pagefault.address - raw(vm.address(0))) & ~(kPage - 1);
      std::memcpy(target->base() + offset, source->base() + offset, kPage);
      uffdio_continue argument{};
      argument.range = {raw(vm.address(offset)), kPage};
      if (::ioctl(vm.uffd, UFFDIO_CONTINUE, &argument) != 0) die("continue");
      ++served;
    }
  });
  const uint64_t p50_ns = touch_all(vm, order);
  handler.join();
  ::close(vm.uffd);
  return p50_ns;
}

uint64_t our_round(const Files& files, const std::vector<uint64_t>& order) {
  files.fresh_target();
  auto listener =
      must(transport::kShmProvider.listen({.host = files.dir + "/sock", .port = 0}, {}), "listen");
  transport::Credentials credentials;
  credentials.session[0] = 1;
  const std::vector<pager::SourceRegionConfig> sources{{files.source(), files.length_bytes, kPage}};
  auto source = must(pager::SourceSession::open(*listener, credentials, sources), "source session");
  const Vm vm(files);
  pager::VmMemory memory;
  memory.pid = ::getpid();
  memory.descriptors.push_back({UniqueFd(vm.uffd), vm.uffd, wire::PreloadDescriptor::kSync});
  memory.ranges.push_back({0, 0, files.length_bytes, vm.address(0), 0});
  const std::vector<pager::TargetRegionConfig> targets{
      {files.target(), files.dir + "/presence", files.length_bytes, kPage}};
  auto session = must(pager::TargetSession::open(memory, targets, {}, false, [] {}), "target session");
  pager::SourceEndpoints endpoints;
  const auto address = listener->address();
  using transport::Channel;
  const auto connect = [&](Channel channel) {
    return transport::kShmProvider.connect(address, credentials, channel, std::chrono::seconds(2), {});
  };
  endpoints.demand = must(connect(Channel::kDemand), "demand");
  endpoints.bulk = must(connect(Channel::kBulk), "bulk");
  endpoints.keys.assign(source->keys().begin(), source->keys().end());
  // scan() is never called: the data map stays unready, so every page is fetched by demand.
  if (!session->connect(std::move(endpoints)).ok() || !session->start().ok()) die("start");
  const uint64_t p50_ns = touch_all(vm, order);
  session->close();
  return p50_ns;
}

uint64_t median(std::vector<uint64_t> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 9;
  const uint64_t page_count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 8192;
  if (rounds < 1 || page_count < 16) {
    std::fprintf(stderr, "usage: fault_bench [ROUNDS] [PAGES]\n");
    return 2;
  }
  const Files files(page_count);
  std::vector<uint64_t> order(page_count);
  for (uint64_t page = 0; page < page_count; ++page) order[page] = page;
  std::shuffle(order.begin(), order.end(), std::mt19937_64(1));
  std::vector<uint64_t> bare, ours;
  for (int round = 0; round < rounds; ++round) {
    bare.push_back(bare_round(files, order));
    ours.push_back(our_round(files, order));
  }
  const uint64_t bare_ns = median(bare), ours_ns = median(ours);
  std::printf("{\"bareP50Ns\": %lu, \"oursP50Ns\": %lu, \"ratio\": %.2f, \"rounds\": %d, \"pages\": %lu}\n",
              bare_ns, ours_ns, static_cast<double>(ours_ns) / static_cast<double>(bare_ns), rounds,
              page_count);
  return 0;
}
