#include "tests/support/pager_harness.hpp"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "memory/region.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::test {

void write_pattern(int fd, uint64_t seed, uint64_t page) {
  uint64_t words[kPage / 8];
  for (uint64_t i = 0; i < kPage / 8; ++i) words[i] = pattern_word(seed, page, i);
  ASSERT_EQ(::pwrite(fd, words, kPage, static_cast<off_t>(page * kPage)), static_cast<ssize_t>(kPage));
}

int open_userfaultfd() {
  const int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (fd < 0) return -1;
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_THREAD_ID;
  if (::ioctl(fd, UFFDIO_API, &api) != 0) {
    ::close(fd);
    return -1;
  }
  return fd;
}

bool eventually(const std::function<bool()>& condition, std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(200us);
  }
  return true;
}

Parking::Parking() {
  Hooked<Parking>::install(*this);
}
Parking::~Parking() {
  release();
  Hooked<Parking>::remove();
}
void Parking::arm(wire::InjectPoint point, std::optional<uint64_t> detail) {
  const std::lock_guard lock(mutex_);
  armed_ = point;
  detail_ = detail;
  parked_ = false;
  released_ = false;
}
bool Parking::wait_parked() {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, [this] { return parked_; });
}
void Parking::release() {
  const std::lock_guard lock(mutex_);
  armed_.reset();
  released_ = true;
  changed_.notify_all();
}
void Parking::meet(wire::InjectPoint point, uint64_t detail) {
  std::unique_lock lock(mutex_);
  if (armed_ != point || parked_ || (detail_ && *detail_ != detail)) return;
  parked_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return released_; });
}

PagerHarness::PagerHarness(Specs specs, std::string target_dir)
    : target_dir_(target_dir.empty() ? dir_.path() : target_dir) {
  for (size_t i = 0; i < specs.size(); ++i) add_region(i, specs[i]);
}
PagerHarness::~PagerHarness() {
  session.reset();
  for (VmRegion& region : regions) {
    if (region.base != nullptr) ::munmap(region.base, region.length_bytes());
  }
}

void PagerHarness::map_vm() {
  for (size_t i = 0; i < regions.size(); ++i) {
    const int uffd = open_userfaultfd();
    ASSERT_GE(uffd, 0) << "userfaultfd: " << strerror(errno);
    memory.descriptors.push_back({UniqueFd(uffd), uffd, wire::PreloadDescriptor::kSync});
    VmRegion& region = regions[i];
    const UniqueFd fd(::open(region.target_path.c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_TRUE(fd.valid());
    void* base = ::mmap(nullptr, region.length_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    ASSERT_NE(base, MAP_FAILED);
    region.base = static_cast<std::byte*>(base);
    const HostAddr address{reinterpret_cast<uint64_t>(base)};
    const auto done = uffd::register_range(
        uffd, address, region.length_bytes(),
        static_cast<uint64_t>(uffd::Mode::kMissing) | static_cast<uint64_t>(uffd::Mode::kMinor));
    ASSERT_EQ(done.outcome, uffd::Outcome::kDone) << strerror(done.system_errno);
    memory.ranges.push_back({static_cast<uint32_t>(i), 0, region.length_bytes(), address,
                             static_cast<uint32_t>(memory.descriptors.size() - 1)});
  }
  memory.pid = ::getpid();
}

std::vector<pager::TargetRegionConfig> PagerHarness::configs() const {
  std::vector<pager::TargetRegionConfig> result;
  for (const VmRegion& region : regions) {
    result.push_back({region.target_path, region.presence_path, region.length_bytes(), region.page_bytes});
  }
  return result;
}

void PagerHarness::open(bool resume, const pager::TargetOptions& options) {
  auto opened = pager::TargetSession::open(memory, configs(), options, resume, [this] { ++edges; });
  ASSERT_TRUE(opened.ok()) << opened.error().what << ": " << strerror(opened.error().system_errno);
  session = std::move(opened).value();
}

pager::SourceEndpoints PagerHarness::endpoints() {
  demand = std::make_shared<FakeControl>();
  bulk = std::make_shared<FakeControl>();
  pager::SourceEndpoints result;
  result.demand = std::make_unique<FakeEndpoint>(source, demand);
  result.bulk = std::make_unique<FakeEndpoint>(source, bulk);
  for (VmRegion& region : regions) {
    const transport::LocalMemory map = region.map->readable();
    result.keys.push_back({source.expose(region.source_fd.get(), region.length_bytes()),
                           source.expose(map.fd, map.length_bytes)});
  }
  for (size_t i = 0; i < regions.size(); ++i) {
    const transport::LocalMemory dirty = regions[i].dirty->readable();
    result.keys[i].dirty_map = source.expose(dirty.fd, dirty.length_bytes);
  }
  return result;
}

void PagerHarness::finish_maps() {
  for (VmRegion& region : regions) {
    uint64_t data = 0;
    for (uint64_t page = 0; page < region.page_count; ++page) {
      bool any = false;
      for (uint64_t i = 0; i < region.page_bytes / kPage; ++i) {
        any |= region.data[page * (region.page_bytes / kPage) + i];
      }
      if (!any) continue;
      region.map->set(PageRun{PageIndex{page}, 1});
      ++data;
    }
    region.map->finish(data);
  }
}

void PagerHarness::rewrite(size_t region, const std::vector<uint64_t>& pages, uint32_t round) {
  VmRegion& written = regions[region];
  written.dirty->begin();
  for (const uint64_t page : pages) {
    written.data[page] = true;
    written.seeds[page] += 100;
    write_pattern(written.source_fd.get(), written.seeds[page], page);
    written.dirty->set(PageRun{PageIndex{page / (written.page_bytes / kPage)}, 1});
  }
  written.dirty->finish(written.dirty->count(), round);
}

void PagerHarness::start(bool maps_ready, const pager::TargetOptions& options) {
  map_vm();
  if (maps_ready) finish_maps();
  open(false, options);
  ASSERT_TRUE(session->connect(endpoints()).ok());
  ASSERT_TRUE(session->start().ok());
}

std::future<uint64_t> PagerHarness::touch(size_t region, uint64_t page, uint64_t word) {
  const volatile auto* address =
      reinterpret_cast<const volatile uint64_t*>(regions[region].base + page * kPage) + word;
  return std::async(std::launch::async, [address] { return *address; });
}
bool PagerHarness::waits(std::future<uint64_t>& reading, std::chrono::milliseconds time) {
  return reading.wait_for(time) == std::future_status::timeout;
}
bool PagerHarness::arrives(std::future<uint64_t>& reading) {
  return reading.wait_for(kPatience) == std::future_status::ready;
}
uint64_t PagerHarness::expected(size_t region, uint64_t page, uint64_t word) const {
  return regions[region].data[page] ? pattern_word(regions[region].seeds[page], page, word) : 0;
}
uint64_t PagerHarness::bad_pages() const {
  uint64_t bad = 0;
  for (size_t r = 0; r < regions.size(); ++r) {
    for (uint64_t page = 0; page < regions[r].length_bytes() / kPage; ++page) {
      const auto* words = reinterpret_cast<const uint64_t*>(regions[r].base + page * kPage);
      bool good = true;
      for (uint64_t word = 0; word < kPage / 8; ++word) good &= words[word] == expected(r, page, word);
      bad += good ? 0 : 1;
    }
  }
  return bad;
}
bool PagerHarness::reaches(pager::TargetState state) {
  return eventually([&] { return session->state() == state; });
}
uint64_t PagerHarness::counter(wire::TargetCounter which) const {
  std::array<uint64_t, wire::kTargetCounterCount> all{};
  session->counters(all);
  return all[static_cast<size_t>(which)];
}

void PagerHarness::add_region(size_t index, const RegionSpec& spec) {
  VmRegion region;
  const std::string name = "ram" + std::to_string(index);
  region.source_path = dir_ / (name + ".source");
  region.target_path = target_dir_ + "/" + name + ".target";
  region.presence_path = dir_ / (name + ".presence");
  region.page_bytes = spec.page_bytes;
  region.page_count = spec.page_count;
  region.seed = index + 1;
  ASSERT_TRUE(memory::Region::create_file(region.source_path, region.length_bytes(), kPage).ok());
  ASSERT_TRUE(memory::Region::create_file(region.target_path, region.length_bytes(), spec.page_bytes).ok());
  region.source_fd.reset(::open(region.source_path.c_str(), O_RDWR | O_CLOEXEC));
  for (uint64_t page = 0; page < region.length_bytes() / kPage; ++page) {
    region.data.push_back(spec.has_data(page));
    region.seeds.push_back(region.seed);
    if (region.data.back()) write_pattern(region.source_fd.get(), region.seed, page);
  }
  auto map = pager::DataMap::create(region.page_count);
  ASSERT_TRUE(map.ok());
  region.map = std::move(map).value();
  auto dirty = pager::DataMap::create(region.page_count, pager::DataMap::Kind::kDirty);
  ASSERT_TRUE(dirty.ok());
  region.dirty = std::move(dirty).value();
  regions.push_back(std::move(region));
}

}  // namespace vmigrate::test
