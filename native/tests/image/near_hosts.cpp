#include "tests/image/near_hosts.hpp"

#include <fcntl.h>

#include <array>
#include <utility>

#include "memory/presence_map.hpp"
#include "memory/region.hpp"

namespace vmigrate::test {

const transport::Provider* provider_named(const std::string& name) {
  for (const auto* each : transport::tested_providers())
    if (each->name == name) return each;
  return nullptr;
}

Host::Host(FetchHarness& root, transport::Listener& listener, const transport::Provider& by, uint32_t id)
    : id(id), root_(root), listener_(listener), provider_(by) {
  region_ = {root.dir_ / ("host" + std::to_string(id) + ".image"),
             root.dir_ / ("host" + std::to_string(id) + ".presence"), kPages * kPage, kPage};
  EXPECT_TRUE(memory::Region::create_file(region_.path, region_.length_bytes, kPage).ok());
}
Host::~Host() {
  session.reset();
  readers_.clear();
  fetch.reset();
  clones.clear();
}
void Host::have(const std::function<bool(uint64_t)>& which) {
  auto map = memory::PresenceMap::create(region_.presence_path, kPages, kPage);
  ASSERT_TRUE(map.ok());
  const UniqueFd file(::open(region_.path.c_str(), O_RDWR | O_CLOEXEC));
  for (uint64_t page = 0; page < kPages; ++page) {
    if (!which(page) || !has_data(page)) continue;
    write_pattern(file.get(), 1, page);
    ASSERT_TRUE(map.value()->claim(PageIndex{page}));
    map.value()->publish({PageIndex{page}, 1});
  }
}
void Host::open(bool resume) {
  auto opened = pager::ImageFetch::open({{region_}, {}, resume, {}, {}});
  ASSERT_TRUE(opened.ok()) << opened.error().what;
  fetch = std::move(opened).value();
}
void Host::connect_root() {
  ASSERT_TRUE(fetch->connect(root_.endpoints()).ok());
  demand = root_.demand;
  bulk = root_.bulk;
}
void Host::start(bool resume) {
  open(resume);
  connect_root();
  ASSERT_TRUE(fetch->start().ok());
  ASSERT_TRUE(eventually([&] { return counter(wire::ImageCounter::kPagesZero) == kPages - kDataPages; }));
}
Status Host::try_serve() {
  session.reset();
  readers_.clear();
  credentials_.session[0] = static_cast<uint8_t>(id + 1);
  credentials_.session[1] = ++sessions_;
  readers_.push_back(fetch->reader(0));
  const pager::SourceRegionConfig config{region_.path, region_.length_bytes, kPage, readers_[0].get()};
  auto opened = pager::SourceSession::open(listener_, credentials_, {&config, 1});
  if (!opened) return opened.error();
  session = std::move(opened).value();
  return ok();
}
void Host::serve() {
  const Status served = try_serve();
  ASSERT_TRUE(served.ok()) << served.error().what;
}
std::unique_ptr<transport::Endpoint> Host::connect(transport::Channel channel) {
  auto connected = transport::connect(provider_, listener_.address(), credentials_, channel);
  EXPECT_TRUE(connected.ok()) << connected.error().what;
  return connected ? std::move(connected).value() : nullptr;
}
pager::SourceEndpoints Host::endpoints() {
  pager::SourceEndpoints result;
  result.demand = connect(transport::Channel::kDemand);
  result.bulk = connect(transport::Channel::kBulk);
  result.keys.assign(session->keys().begin(), session->keys().end());
  return result;
}
void Host::read_from(Host& near, uint32_t level) {
  const Status added = fetch->add_near(near.endpoints(), near.id, level);
  ASSERT_TRUE(added.ok()) << added.error().what;
}
MappedVm& Host::add_clone() {
  clones.push_back(std::make_unique<MappedVm>(std::vector{region_.path}, std::vector{region_.length_bytes},
                                              VmKind::kClone));
  EXPECT_TRUE(fetch->add_clone(clones.back()->memory).ok());
  return *clones.back();
}
bool Host::reaches(pager::ImageState state) const {
  return eventually([&] { return fetch->state() == state; });
}
uint64_t Host::counter(wire::ImageCounter which) const {
  std::array<uint64_t, wire::kImageCounterCount> all{};
  fetch->counters(all);
  return all[static_cast<size_t>(which)];
}
uint64_t Host::from_root() const {
  return counter(wire::ImageCounter::kDemandBytes) + counter(wire::ImageCounter::kPrefetchBytes);
}
void Host::is_right() {
  ASSERT_TRUE(reaches(pager::ImageState::kComplete));
  EXPECT_EQ(root_.bad_pages(add_clone()), 0u) << id;
  EXPECT_EQ(ImageHarness::contents(region_.path, kPages * kPage),
            ImageHarness::contents(root_.holder_paths[0], kPages * kPage));
}

HostsTest::HostsTest() : root(FetchHarness::Specs{{kPages, has_data}}) {}
HostsTest::~HostsTest() = default;

void HostsTest::SetUp() {
  listener = transport::must_listen(*provider_named("tcp"));
  root.finish_maps();
  for (uint32_t id = 0; id < 3; ++id)
    hosts.push_back(std::make_unique<Host>(root, *listener, *provider_named("tcp"), id));
}
void HostsTest::TearDown() {
  hosts.clear();
}

}  // namespace vmigrate::test
