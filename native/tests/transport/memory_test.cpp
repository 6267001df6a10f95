// Tests the bytes: reads and writes of every kind of memory, in batches, by several threads.

#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <thread>

#include "tests/support/huge_pages.hpp"
#include "tests/transport/compliance.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

std::string case_name(const testing::TestParamInfo<ComplianceCase>& info) {
  return std::string(info.param.provider->name) + (info.param.faulty ? "_faulty" : "_bare") +
         (info.param.security == Security::kNone        ? ""
          : info.param.security == Security::kIntegrity ? "_integrity"
                                                        : "_encrypt");
}

TEST_P(TransportCompliance, ReadsAWholeRegion) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  remote.fill(1);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::vector<Operation> operations;
  for (uint64_t at = 0; at < kRegionBytes; at += wire::kTransferBytesMax)
    operations.push_back(make_operation(at, id, at, key, at, wire::kTransferBytesMax));
  const auto completions = run_all(*endpoint, operations);
  ASSERT_EQ(completions.size(), operations.size());
  for (const Completion& completion : completions) EXPECT_EQ(completion.result, OpResult::kOk);
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), kRegionBytes), 0);
}

/// Memory of which the part below `here_bytes` is there.
class Growing final : public MemoryReader {
 public:
  explicit Growing(const TestMemory& memory) : memory_(memory) {}
  bool is_here(uint64_t offset_bytes, uint64_t length_bytes) const override {
    return offset_bytes + length_bytes <= here_bytes;
  }
  Status read(uint64_t offset_bytes, std::span<std::byte> out) const override {
    std::memcpy(out.data(), memory_.base() + offset_bytes, out.size());
    return ok();
  }
  std::atomic<uint64_t> here_bytes{0};

 private:
  const TestMemory& memory_;
};

TEST_P(TransportCompliance, SaysWhatIsNotThereYet) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  remote.fill(1);
  Growing growing(remote);
  growing.here_bytes = 1 << 20;
  listen();
  const auto key = session_->expose({.length_bytes = kRegionBytes, .reader = &growing}, Access::kRead);
  ASSERT_EQ(key.ok(), provider().serves_by_thread);
  if (!key) return session_.reset();
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  const auto read = [&](uint64_t at, uint64_t length_bytes) {
    return run_one(*endpoint, make_operation(1, id, at, key.value(), at, length_bytes));
  };
  EXPECT_EQ(read(0, 1 << 20), OpResult::kOk);
  EXPECT_EQ(read(1 << 20, 4096), OpResult::kAbsent);
  EXPECT_EQ(read((1 << 20) - 4096, 8192), OpResult::kAbsent) << "a part is enough";
  EXPECT_EQ(read(4 << 20, 1 << 20), OpResult::kAbsent);
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key.value(), kRegionBytes, 4096)),
            OpResult::kOutOfRange);
  growing.here_bytes = kRegionBytes;
  EXPECT_EQ(read(1 << 20, 1 << 20), OpResult::kOk) << "the connection goes on";
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), 2 << 20), 0);
  session_.reset();
}

TEST_P(TransportCompliance, ReadsRandomRangesAndTouchesNothingElse) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  remote.fill(2);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::mt19937_64 random(42);
  std::vector<std::byte> expected(kRegionBytes);
  std::vector<Operation> operations;
  for (uint64_t at = 0; at + 70'000 < kRegionBytes;) {
    const uint64_t length = 1 + random() % 60'000;
    const uint64_t from = random() % (kRegionBytes - length);
    operations.push_back(make_operation(operations.size(), id, at, key, from, length));
    std::memcpy(expected.data() + at, remote.base() + from, length);
    at += length + random() % 10'000;
  }
  for (const Completion& completion : run_all(*endpoint, operations))
    ASSERT_EQ(completion.result, OpResult::kOk);
  EXPECT_EQ(std::memcmp(expected.data(), local.base(), kRegionBytes), 0);
}

TEST_P(TransportCompliance, BatchLargerThanTheQueueWouldBlockThenContinues) {
  constexpr size_t kCount = 5 * wire::kOutstandingOpsMax;
  TestMemory remote(kCount * 4096), local(kCount * 4096);
  remote.fill(3);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::vector<Operation> operations;
  for (uint64_t i = 0; i < kCount; ++i)
    operations.push_back(make_operation(i, id, i * 4096, key, i * 4096, 4096));
  const PostResult first = endpoint->read(operations);
  EXPECT_EQ(first.status, PostStatus::kWouldBlock);
  EXPECT_LE(first.posted, wire::kOutstandingOpsMax);
  if (!GetParam().faulty) {
    EXPECT_EQ(first.posted, wire::kOutstandingOpsMax);
    EXPECT_EQ(endpoint->read(std::span(operations).subspan(first.posted)).posted, 0u);
  }
  std::vector<bool> seen(kCount);
  std::vector<Completion> all(first.posted);
  for (size_t done = 0; done < first.posted;) {
    done += endpoint->poll(std::span(all).subspan(done));
    ASSERT_FALSE(endpoint->disconnected());
  }
  const auto rest = run_all(*endpoint, std::span(operations).subspan(first.posted));
  all.insert(all.end(), rest.begin(), rest.end());
  for (const Completion& completion : all) {
    ASSERT_EQ(completion.result, OpResult::kOk);
    ASSERT_FALSE(seen[completion.tag]) << "completed twice";
    seen[completion.tag] = true;
  }
  EXPECT_EQ(all.size(), kCount);
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), kCount * 4096), 0);
}

TEST_P(TransportCompliance, TagsAreTheCallersAndNeedNotDiffer) {
  TestMemory remote(65536), local(65536);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  const uint64_t tags[] = {0, UINT64_MAX, 5, 5, 1ull << 63};
  std::vector<Operation> operations;
  for (uint64_t i = 0; i < std::size(tags); ++i)
    operations.push_back(make_operation(tags[i], id, i * 4096, key, 0, 4096));
  std::vector<uint64_t> returned;
  for (const Completion& completion : run_all(*endpoint, operations)) returned.push_back(completion.tag);
  EXPECT_TRUE(std::is_permutation(returned.begin(), returned.end(), std::begin(tags), std::end(tags)));
}

TEST_P(TransportCompliance, CompletionsWaitUntilTheyAreTakenOneByOne) {
  TestMemory remote(65536), local(65536);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::vector<Operation> operations;
  for (uint64_t i = 0; i < 8; ++i) operations.push_back(make_operation(i, id, i * 4096, key, 0, 4096));
  size_t posted = 0;
  while (posted < operations.size()) posted += endpoint->read(std::span(operations).subspan(posted)).posted;
  for (size_t taken = 0; taken < operations.size();) {
    ASSERT_TRUE(wait_ready(*endpoint, kPatience))
        << "not ready with " << operations.size() - taken << " left";
    Completion one;
    taken += endpoint->poll(std::span(&one, 1));
  }
}

TEST_P(TransportCompliance, WritesWhereTheKeyAllowsItAndNowhereElse) {
  TestMemory writable(2 << 20), readable(2 << 20), local(2 << 20);
  readable.fill(4);
  local.fill(5);
  listen();
  const RemoteKey write_key = must_expose_memory(writable, Access::kReadWrite);
  const RemoteKey read_key = must_expose_memory(readable, Access::kRead);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::vector<Operation> operations;
  for (uint64_t at = 0; at < local.length_bytes();) {
    const uint64_t length = std::min<uint64_t>(local.length_bytes() - at, 100'001);
    operations.push_back(make_operation(at, id, at, write_key, at, length));
    at += length;
  }
  for (const Completion& completion : run_all(*endpoint, operations, true))
    ASSERT_EQ(completion.result, OpResult::kOk);
  EXPECT_EQ(std::memcmp(writable.base(), local.base(), local.length_bytes()), 0);

  TestMemory copy(2 << 20);
  std::memcpy(copy.base(), readable.base(), copy.length_bytes());
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, read_key, 0, 1 << 20), true), OpResult::kNotAllowed);
  EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 0, write_key, (2 << 20) - 4095, 4096), true),
            OpResult::kOutOfRange);
  EXPECT_EQ(std::memcmp(copy.base(), readable.base(), copy.length_bytes()), 0);
  EXPECT_EQ(std::memcmp(writable.base(), local.base(), local.length_bytes()), 0);
  EXPECT_EQ(run_one(*endpoint, make_operation(3, id, 0, read_key, 0, 1 << 20)), OpResult::kOk);
}

TEST_P(TransportCompliance, LocalMemoryWithoutAFile) {
  TestMemory remote(1 << 20);
  remote.fill(6);
  std::vector<std::byte> local(1 << 20);
  listen();
  const RemoteKey key = must_expose_memory(remote, Access::kReadWrite);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(LocalMemory{local.data(), -1, 0, local.size()}).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 1 << 20)), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.data(), remote.base(), local.size()), 0);
  std::fill(local.begin(), local.end(), std::byte{7});
  EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 0, key, 0, 1 << 20), true), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.data(), remote.base(), local.size()), 0);
}

TEST_P(TransportCompliance, RegionsInsideAFile) {
  TestMemory remote(1 << 20), local(1 << 20);
  remote.fill(7);
  listen();
  const LocalMemory part{remote.base() + 12345, remote.fd(), 12345, 500'000};
  const RemoteKey key = session_->expose(part, Access::kRead).value();
  const auto endpoint = must_connect();
  const LocalMemory landing{local.base() + 4096, local.fd(), 4096, 600'000};
  const LocalId id = endpoint->register_local(landing).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 77, key, 0, 500'000)), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.base() + 4096 + 77, remote.base() + 12345, 500'000), 0);
  EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 0, key, 499'999, 2)), OpResult::kOutOfRange);
}

TEST_P(TransportCompliance, TwoChannelsFromTwoThreads) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  remote.fill(8);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto demand = must_connect(Channel::kDemand);
  const auto bulk = must_connect(Channel::kBulk);
  std::thread bulk_thread([&] {
    const LocalId id = bulk->register_local(local.local()).value();
    std::vector<Operation> operations;
    for (uint64_t at = kRegionBytes / 2; at < kRegionBytes; at += 256 << 10)
      operations.push_back(make_operation(at, id, at, key, at, 256 << 10));
    for (const Completion& completion : run_all(*bulk, operations))
      EXPECT_EQ(completion.result, OpResult::kOk);
  });
  const LocalId id = demand->register_local(local.local()).value();
  for (uint64_t at = 0; at < kRegionBytes / 2; at += 4096)
    ASSERT_EQ(run_one(*demand, make_operation(at, id, at, key, at, 4096)), OpResult::kOk);
  bulk_thread.join();
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), kRegionBytes), 0);
  EXPECT_EQ(session_->counters().connections, 2u);
  if (provider().serves_by_thread) {
    EXPECT_EQ(session_->counters().read_bytes, kRegionBytes);
    EXPECT_EQ(session_->counters().read_count, kRegionBytes / 2 / 4096 + kRegionBytes / 2 / (256 << 10));
    EXPECT_GT(session_->counters().cpu_ns, 0u);
  } else {
    EXPECT_EQ(session_->counters().read_count, 0u);  // the source cannot know
  }
}

TEST_P(TransportCompliance, HolesReadAsZeros) {
  TestMemory remote(1 << 20), local(1 << 20);
  local.fill(13);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 1 << 20)), OpResult::kOk);
  EXPECT_TRUE(
      std::all_of(local.base(), local.base() + (1 << 20), [](std::byte b) { return b == std::byte{}; }));
}

TEST_P(TransportCompliance, HugePagesOnBothSides) {
  constexpr uint64_t kHuge = 2 << 20;
  const test::HugePages pages(8);
  if (!pages.is_mounted()) GTEST_SKIP() << "needs huge-pages: none can be reserved here";
  TestMemory remote(kHuge, {}, MFD_HUGETLB), local(kHuge, {}, MFD_HUGETLB);
  remote.fill(14);
  listen();
  const RemoteKey key = must_expose_memory(remote, Access::kReadWrite);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 1 << 20)), OpResult::kOk);
  EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 1 << 20, key, 1 << 20, 1 << 20)), OpResult::kOk);
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), kHuge), 0);
  local.fill(15);
  EXPECT_EQ(run_one(*endpoint, make_operation(3, id, 4096, key, 4096, 1 << 20), true), OpResult::kOk);
  EXPECT_EQ(std::memcmp(remote.base() + 4096, local.base() + 4096, 1 << 20), 0);
}

std::vector<ComplianceCase> all_cases() {
  std::vector<ComplianceCase> cases;
  for (const Provider* provider : tested_providers())
    for (const bool faulty : {false, true}) {
      cases.push_back({provider, faulty});
      if (!provider->protects_frames) continue;
      cases.push_back({provider, faulty, Security::kIntegrity});
      cases.push_back({provider, faulty, Security::kEncrypt});
    }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Providers, TransportCompliance, testing::ValuesIn(all_cases()), case_name);

}  // namespace
}  // namespace vmigrate::transport
