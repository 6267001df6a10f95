#include "tests/image/harness.hpp"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "memory/region.hpp"
#include "uffd/uffd.hpp"

namespace vmigrate::test {

int open_write_protect_userfaultfd() {
  const int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                 (1 << 12) /* WP_HUGETLBFS_SHMEM */ | (1 << 13) /* WP_UNPOPULATED */;
  if (fd >= 0 && ::ioctl(fd, UFFDIO_API, &api) == 0) return fd;
  if (fd >= 0) ::close(fd);
  return -1;
}

MappedVm::MappedVm(const std::vector<std::string>& paths, const std::vector<uint64_t>& lengths, VmKind kind) {
  for (uint32_t i = 0; i < paths.size(); ++i) {
    // A clone needs no write-protection, and runs where the kernel has none.
    const int uffd = kind == VmKind::kClone ? open_userfaultfd() : open_write_protect_userfaultfd();
    EXPECT_GE(uffd, 0) << "userfaultfd: " << strerror(errno);
    const UniqueFd fd(::open(paths[i].c_str(), O_RDWR | O_CLOEXEC));
    void* mapped = ::mmap(nullptr, lengths[i], PROT_READ | PROT_WRITE,
                          kind == VmKind::kParent ? MAP_SHARED : MAP_PRIVATE, fd.get(), 0);
    EXPECT_NE(mapped, MAP_FAILED);
    const HostAddr address{reinterpret_cast<uint64_t>(mapped)};
    memory.descriptors.push_back({UniqueFd(uffd), uffd, wire::PreloadDescriptor::kSync});
    memory.ranges.push_back({i, 0, lengths[i], address, i});
    if (kind != VmKind::kClone) continue;
    EXPECT_EQ(uffd::register_range(
                  uffd, address, lengths[i],
                  static_cast<uint64_t>(uffd::Mode::kMissing) | static_cast<uint64_t>(uffd::Mode::kMinor))
                  .outcome,
              uffd::Outcome::kDone);
  }
  memory.pid = ::getpid();
}
MappedVm::~MappedVm() {
  for (const auto& range : memory.ranges) ::munmap(base(range.region_index), range.length_bytes);
}

std::future<uint64_t> MappedVm::read(uint64_t page, uint32_t region) const {
  auto* address = word(region, page);
  return std::async(std::launch::async, [address] { return *address; });
}
std::future<uint64_t> MappedVm::write(uint64_t page, uint64_t value, uint32_t region) const {
  auto* address = word(region, page);
  return std::async(std::launch::async, [address, value] {
    *address = value;
    return value;
  });
}
bool MappedVm::is_registered() const {
  std::ifstream smaps("/proc/self/smaps");
  bool is_ours = false;
  for (std::string line; std::getline(smaps, line);) {
    uint64_t first = 0, last = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &first, &last) == 2) {
      is_ours = false;
      for (const auto& range : memory.ranges)
        is_ours |= first < raw(range.base) + range.length_bytes && raw(range.base) < last;
    } else if (is_ours && line.starts_with("VmFlags:")) {
      for (const char* flag : {" um", " uw", " ui"})
        if (line.find(flag) != std::string::npos) return true;
    }
  }
  return false;
}

bool waits(std::future<uint64_t>& access, std::chrono::milliseconds time) {
  return access.wait_for(time) == std::future_status::timeout;
}
bool arrives(std::future<uint64_t>& access) {
  return access.wait_for(kPatience) == std::future_status::ready;
}

Gates::Gates() {
  Hooked<Gates>::install(*this);
}
Gates::~Gates() {
  {
    const std::lock_guard lock(mutex_);
    for (auto& gate : gates_) gate->is_open = true;
    changed_.notify_all();
  }
  Hooked<Gates>::remove();
}
Gates::Gate& Gates::close(wire::InjectPoint point, std::optional<uint64_t> detail) {
  const std::lock_guard lock(mutex_);
  gates_.push_back(std::make_unique<Gate>(Gate{point, detail}));
  return *gates_.back();
}
bool Gates::wait_parked(const Gate& gate) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, [&] { return gate.is_parked; });
}
void Gates::open(Gate& gate) {
  const std::lock_guard lock(mutex_);
  gate.is_open = true;
  changed_.notify_all();
}

void Gates::meet(wire::InjectPoint point, uint64_t detail) {
  std::unique_lock lock(mutex_);
  for (const auto& each : gates_) {
    Gate& gate = *each;  // keeps its address when more gates are closed meanwhile
    if (gate.point != point || gate.is_parked || gate.is_open) continue;
    if (gate.detail && *gate.detail != detail) continue;
    gate.is_parked = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return gate.is_open; });
    return;
  }
}

size_t image_thread_count() {
  size_t count = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::ifstream(task.path() / "comm") >> name;
    count += name.starts_with("vmg-im") ? 1 : 0;
  }
  return count;
}

bool image_threads_end() {
  return eventually([] { return image_thread_count() == 0; });
}

ImageHarness::ImageHarness(Specs specs, const std::string& image_dir, VmKind parent_kind,
                           const std::string& source_dir)
    : is_parent_private_(parent_kind == VmKind::kPrivateParent) {
  const std::string target = image_dir.empty() ? dir_.path() : image_dir;
  for (size_t i = 0; i < specs.size(); ++i) {
    const std::string name = "ram" + std::to_string(i);
    const uint64_t length_bytes = specs[i].page_count * kPage;
    source_paths.push_back((source_dir.empty() ? dir_.path() : source_dir) + "/" + name);
    image_paths.push_back(target + "/" + name + ".image");
    presence_paths.push_back(dir_ / (name + ".presence"));
    lengths.push_back(length_bytes);
    page_sizes.push_back(specs[i].page_bytes);
    EXPECT_TRUE(memory::Region::create_file(source_paths[i], length_bytes, specs[i].page_bytes).ok());
    const UniqueFd image(::open(image_paths[i].c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    EXPECT_EQ(::ftruncate(image.get(), static_cast<off_t>(length_bytes)), 0);
    const UniqueFd fd(::open(source_paths[i].c_str(), O_RDWR | O_CLOEXEC));
    // hugetlbfs cannot be written, so its pages are filled through the parent's mapping.
    for (uint64_t page = 0; source_dir.empty() && page < specs[i].page_count; ++page)
      if (specs[i].has_data(page)) write_pattern(fd.get(), i + 1, page);
  }
  parent = std::make_unique<MappedVm>(source_paths, lengths, parent_kind);
  for (uint64_t page = 0; !source_dir.empty() && page < specs[0].page_count; ++page)
    for (uint64_t word = 0; word < kPage / 8; ++word)
      parent->word(0, page)[word] = pattern_word(1, page, word);
}
ImageHarness::~ImageHarness() {
  capture.reset();
  // No waiter may be left to a kernel that fills with zeros while the test ends.
  clones.clear();
}

Result<std::unique_ptr<pager::ImageCapture>> ImageHarness::try_open(bool resume, bool has_parent) {
  pager::ImageConfig config;
  config.parent = has_parent ? &parent->memory : nullptr;
  for (size_t i = 0; i < lengths.size(); ++i) {
    config.source.push_back({source_paths[i], lengths[i], page_sizes[i], is_parent_private_});
    config.image.push_back({image_paths[i], presence_paths[i], lengths[i], page_sizes[i]});
  }
  config.resume = resume;
  config.on_edge = [this] { ++edges; };
  return pager::ImageCapture::open(std::move(config));
}
void ImageHarness::open(bool resume, bool has_parent) {
  auto opened = try_open(resume, has_parent);
  ASSERT_TRUE(opened.ok()) << opened.error().what << ": " << strerror(opened.error().system_errno);
  capture = std::move(opened).value();
}
void ImageHarness::arm() {
  const Status armed = capture->arm();
  ASSERT_TRUE(armed.ok()) << armed.error().what << ": " << strerror(armed.error().system_errno);
}
void ImageHarness::seal(pager::Sweep when) {
  remember();
  const Status sealed = capture->seal(when);
  ASSERT_TRUE(sealed.ok()) << sealed.error().what << ": " << strerror(sealed.error().system_errno);
}
void ImageHarness::remember() {
  fork_point.clear();
  for (size_t i = 0; i < lengths.size(); ++i) fork_point.push_back(contents(source_paths[i], lengths[i]));
}
MappedVm& ImageHarness::add_clone() {
  clones.push_back(std::make_unique<MappedVm>(image_paths, lengths, VmKind::kClone));
  EXPECT_TRUE(capture->add_clone(clones.back()->memory).ok());
  return *clones.back();
}

std::vector<uint64_t> ImageHarness::contents(const std::string& path, uint64_t length_bytes) {
  std::vector<uint64_t> words(length_bytes / 8);
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(::pread(fd.get(), words.data(), length_bytes, 0), static_cast<ssize_t>(length_bytes));
  return words;
}
uint64_t ImageHarness::bad_image_pages() const {
  uint64_t bad = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto image = contents(image_paths[i], lengths[i]);
    for (uint64_t at = 0; at < image.size(); at += kPage / 8)
      bad += std::memcmp(&image[at], &fork_point[i][at], kPage) == 0 ? 0 : 1;
  }
  return bad;
}
uint64_t ImageHarness::bad_pages(const MappedVm& clone) const {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < lengths.size(); ++i)
    for (uint64_t page = 0; page < lengths[i] / kPage; ++page)
      bad +=
          std::memcmp(clone.base(i) + page * kPage, &fork_point[i][page * (kPage / 8)], kPage) == 0 ? 0 : 1;
  return bad;
}
bool ImageHarness::reaches(pager::ImageState state) const {
  return eventually([&] { return capture->state() == state; });
}
uint64_t ImageHarness::counter(wire::ImageCounter which) const {
  std::array<uint64_t, wire::kImageCounterCount> all{};
  capture->counters(all);
  return all[static_cast<size_t>(which)];
}

}  // namespace vmigrate::test
