#include "tests/image/fetch_harness.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <utility>

#include "memory/region.hpp"

namespace vmigrate::test {

FetchHarness::FetchHarness(const Specs& specs, const std::string& image_directory) {
  for (size_t i = 0; i < specs.size(); ++i) {
    const std::string name = "ram" + std::to_string(i);
    const uint64_t length_bytes = specs[i].page_count * kPage;
    lengths.push_back(length_bytes);
    holder_paths.push_back(dir_ / (name + ".holder"));
    image_paths.push_back((image_directory.empty() ? dir_.path() : image_directory) + "/" + name + ".image");
    presence_paths.push_back(dir_ / (name + ".presence"));
    for (const std::string& path : {holder_paths[i], image_paths[i]})
      EXPECT_TRUE(memory::Region::create_file(path, length_bytes, kPage).ok());
    holder_fds.emplace_back(::open(holder_paths[i].c_str(), O_RDWR | O_CLOEXEC));
    auto map = pager::DataMap::create(specs[i].page_count);
    EXPECT_TRUE(map.ok());
    maps.push_back(std::move(map).value());
    std::vector<bool> has_data;
    for (uint64_t page = 0; page < specs[i].page_count; ++page) {
      has_data.push_back(specs[i].has_data(page));
      if (has_data.back()) write_pattern(holder_fds[i].get(), i + 1, page);
    }
    data.push_back(std::move(has_data));
  }
}
FetchHarness::~FetchHarness() {
  fetch.reset();
  clones.clear();
}

void FetchHarness::finish_maps() {
  for (size_t i = 0; i < maps.size(); ++i) {
    uint64_t count = 0;
    for (uint64_t page = 0; page < data[i].size(); ++page) {
      if (!data[i][page]) continue;
      maps[i]->set(PageRun{PageIndex{page}, 1});
      ++count;
    }
    maps[i]->finish(count);
  }
}
void FetchHarness::use_digests() {
  std::vector<pager::DigestRegionConfig> root, own;
  for (size_t i = 0; i < lengths.size(); ++i) {
    root.push_back({holder_paths[i], holder_paths[i] + ".digests", lengths[i], kPage});
    own.push_back({image_paths[i], image_paths[i] + ".digests", lengths[i], kPage});
  }
  auto opened = pager::ImageDigests::open(root);
  auto opened_own = pager::ImageDigests::open(own);
  ASSERT_TRUE(opened.ok() && opened_own.ok());
  root_digests = opened.value();
  digests = opened_own.value();
  for (uint32_t i = 0; i < lengths.size(); ++i)
    ASSERT_TRUE(root_digests->make(i, lengths[i] / kPage - root_digests->known(i).value()).ok());
}
void FetchHarness::know(uint64_t end_page, uint32_t region) {
  const uint64_t known = digests->known(region).value();
  if (end_page <= known) return;
  const auto bytes = root_digests->read(region, PageIndex{known}, end_page - known);
  ASSERT_TRUE(bytes.ok());
  ASSERT_TRUE(digests->accept(region, PageIndex{known}, bytes.value()).ok());
}
void FetchHarness::know_all() {
  for (uint32_t i = 0; i < lengths.size(); ++i) know(lengths[i] / kPage, i);
}
void FetchHarness::serve_damaged(uint64_t page, bool is_damaged, uint32_t region) {
  write_pattern(holder_fds[region].get(), region + 1, page);
  if (!is_damaged) return;
  const uint64_t word = pattern_word(region + 1, page, 511) ^ 1;
  ASSERT_EQ(::pwrite(holder_fds[region].get(), &word, 8, static_cast<off_t>((page + 1) * kPage - 8)), 8);
}
void FetchHarness::open(bool resume) {
  pager::ImageFetchConfig config;
  for (size_t i = 0; i < lengths.size(); ++i)
    config.image.push_back({image_paths[i], presence_paths[i], lengths[i], kPage});
  config.resume = resume;
  config.digests = digests;
  config.on_edge = [this] { ++edges; };
  auto opened = pager::ImageFetch::open(std::move(config));
  ASSERT_TRUE(opened.ok()) << opened.error().what;
  fetch = std::move(opened).value();
}
pager::SourceEndpoints FetchHarness::endpoints() {
  demand = std::make_shared<FakeControl>();
  bulk = std::make_shared<FakeControl>();
  pager::SourceEndpoints result;
  result.demand = std::make_unique<FakeEndpoint>(source, demand);
  result.bulk = std::make_unique<FakeEndpoint>(source, bulk);
  for (size_t i = 0; i < lengths.size(); ++i) {
    const transport::LocalMemory map = maps[i]->readable();
    result.keys.push_back(
        {source.expose(holder_fds[i].get(), lengths[i]), source.expose(map.fd, map.length_bytes)});
  }
  return result;
}
void FetchHarness::start() {
  open();
  ASSERT_TRUE(fetch->connect(endpoints()).ok());
  ASSERT_TRUE(fetch->start().ok());
}
MappedVm& FetchHarness::add_clone() {
  clones.push_back(std::make_unique<MappedVm>(image_paths, lengths, VmKind::kClone));
  EXPECT_TRUE(fetch->add_clone(clones.back()->memory).ok());
  return *clones.back();
}
uint64_t FetchHarness::bad_pages(const MappedVm& clone) const {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < lengths.size(); ++i) {
    for (uint64_t page = 0; page < lengths[i] / kPage; ++page) {
      bool good = true;
      for (uint64_t word = 0; word < kPage / 8; ++word)
        good &= clone.word(i, page)[word] == (data[i][page] ? pattern_word(i + 1, page, word) : 0);
      bad += good ? 0 : 1;
    }
  }
  return bad;
}
uint64_t FetchHarness::allocated_bytes(uint32_t region) const {
  struct stat file {};
  EXPECT_EQ(::stat(image_paths[region].c_str(), &file), 0);
  return static_cast<uint64_t>(file.st_blocks) * 512;
}
bool FetchHarness::reaches(pager::ImageState state) const {
  return eventually([&] { return fetch->state() == state; });
}
uint64_t FetchHarness::counter(wire::ImageCounter which) const {
  std::array<uint64_t, wire::kImageCounterCount> all{};
  fetch->counters(all);
  return all[static_cast<size_t>(which)];
}

}  // namespace vmigrate::test
