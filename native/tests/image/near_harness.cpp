#include "tests/image/near_harness.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <span>
#include <utility>

namespace vmigrate::test {
namespace {

/// As a device answers: its owner reads the state of a page first.
class DeviceEndpoint final : public transport::Endpoint {
 public:
  explicit DeviceEndpoint(std::unique_ptr<transport::Endpoint> inner) : inner_(std::move(inner)) {}
  Result<transport::LocalId> register_local(const transport::LocalMemory& m) override {
    return inner_->register_local(m);
  }
  transport::PostResult read(std::span<const transport::Operation> o) override { return inner_->read(o); }
  transport::PostResult write(std::span<const transport::Operation> o) override { return inner_->write(o); }
  size_t poll(std::span<transport::Completion> out) override { return inner_->poll(out); }
  transport::PostStatus send(std::span<const std::byte> m) override { return inner_->send(m); }
  size_t receive(std::span<std::byte> m) override { return inner_->receive(m); }
  bool disconnected() const override { return inner_->disconnected(); }
  int event_fd() const override { return inner_->event_fd(); }
  bool is_device() const override { return true; }

 private:
  std::unique_ptr<transport::Endpoint> inner_;
};

}  // namespace

FakeNear::FakeNear(FetchHarness& host, uint32_t holder_id, uint32_t holder_level, Kind kind)
    : id(holder_id), level(holder_level), host_(host), kind_(kind) {
  before_gone = [this] {
    if (host_.fetch) host_.fetch->remove_near(id);
  };
  for (const uint64_t length_bytes : host.lengths) {
    states_.emplace_back(::memfd_create("states", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(states_.back().get(), static_cast<off_t>(length_bytes / kPage)), 0);
  }
}

FakeNear::~FakeNear() {
  before_gone();
  for (const auto& control : controls_) EXPECT_TRUE(eventually([&] { return control->was_destroyed(); }));
}
void FakeNear::set_raw(uint64_t page, uint8_t byte, uint32_t region) {
  ASSERT_EQ(::pwrite(states_[region].get(), &byte, 1, static_cast<off_t>(page)), 1);
}
void FakeNear::have(const std::function<bool(uint64_t)>& which) {
  for (uint32_t region = 0; region < host_.lengths.size(); ++region)
    for (uint64_t page = 0; page < host_.data[region].size(); ++page)
      if (which(page))
        set(page, host_.data[region][page] ? wire::PageState::kPresent : wire::PageState::kZero, region);
}
void FakeNear::have_all() {
  have([](uint64_t) { return true; });
}
wire::PageState FakeNear::state(uint64_t page, uint32_t region) const {
  uint8_t byte = 0;
  EXPECT_EQ(::pread(states_[region].get(), &byte, 1, static_cast<off_t>(page)), 1);
  return wire::PageState{byte};
}

pager::SourceEndpoints FakeNear::endpoints() {
  demand = std::make_shared<FakeControl>();
  bulk = std::make_shared<FakeControl>();
  controls_.insert(controls_.end(), {demand, bulk});
  pager::SourceEndpoints result;
  result.demand = endpoint(demand);
  result.bulk = endpoint(bulk);
  keys_.clear();
  for (uint32_t i = 0; i < host_.lengths.size(); ++i) {
    pager::SourceRegionKeys keys;
    keys.ram = source_.expose(file_ >= 0 ? file_ : host_.holder_fds[i].get(), host_.lengths[i]);
    keys.presence = source_.expose(states_[i].get(), host_.lengths[i] / kPage);
    keys_.push_back(keys);
  }
  result.keys = keys_;
  // A thread of the holder looks itself; a device reads whatever is there.
  for (auto [control, count] : {std::pair{demand.get(), &demand_reads}, {bulk.get(), &bulk_reads}}) {
    control->result = [this, count](const transport::Operation& op) {
      const int region = region_of(op);
      if (region < 0) {
        ++looks;
        return look_result.load();
      }
      *count += op.length_bytes / kPage;
      if (kind_ == Kind::kDevice || !is_honest) return page_result.load();
      for (uint64_t page = op.remote_offset_bytes / kPage;
           page < (op.remote_offset_bytes + op.length_bytes) / kPage; ++page) {
        const auto at = state(page, static_cast<uint32_t>(region));
        if (at != wire::PageState::kPresent && at != wire::PageState::kZero)
          return transport::OpResult::kAbsent;
      }
      return page_result.load();
    };
  }
  return result;
}
Status FakeNear::add() {
  return host_.fetch->add_near(endpoints(), id, level);
}
pager::NearSnapshot FakeNear::snapshot() const {
  for (const auto& near : host_.fetch->nears())
    if (near.id == id) return near;
  return {};
}
bool FakeNear::is_dropped(ErrorCode code) const {
  return eventually([&] {
    const auto near = snapshot();
    return !near.is_connected && near.failure && near.failure->code == code;
  });
}

std::unique_ptr<transport::Endpoint> FakeNear::endpoint(const std::shared_ptr<FakeControl>& control) {
  std::unique_ptr<transport::Endpoint> made = std::make_unique<FakeEndpoint>(source_, control);
  if (kind_ == Kind::kDevice) made = std::make_unique<DeviceEndpoint>(std::move(made));
  return made;
}
int FakeNear::region_of(const transport::Operation& op) const {
  for (size_t i = 0; i < keys_.size(); ++i)
    if (keys_[i].ram.key == op.remote.key) return static_cast<int>(i);
  return -1;
}

NearTest::NearTest() : host(FetchHarness::Specs{{kPages, is_data}}) {}
NearTest::~NearTest() = default;

void NearTest::start() {
  host.finish_maps();
  host.start();
  ASSERT_TRUE(
      eventually([&] { return host.counter(wire::ImageCounter::kPagesZero) == kPages - kDataPages; }));
}
uint64_t NearTest::from_root() const {
  return host.counter(wire::ImageCounter::kDemandBytes) + host.counter(wire::ImageCounter::kPrefetchBytes);
}
void NearTest::sweep_to_the_end() {
  ASSERT_TRUE(host.fetch->sweep().ok());
  ASSERT_TRUE(host.reaches(pager::ImageState::kComplete));
  EXPECT_EQ(host.counter(wire::ImageCounter::kCopiedBytes), kDataPages * kPage);
  EXPECT_EQ(host.bad_pages(host.add_clone()), 0u);
}

}  // namespace vmigrate::test
