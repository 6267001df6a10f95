// Tests that only concern verbs: requests for keys, registrations in chunks, cables.

#if __has_include(<infiniband/verbs.h>) && __has_include(<rdma/rdma_cma.h>)

#include <dirent.h>

#include <cstdlib>
#include <random>

#include "tests/transport/fixture.hpp"
#include "transport/verbs/host/cm.hpp"
#include "transport/verbs/keys.hpp"
#include "transport/verbs/provider.hpp"

namespace vmigrate::transport {
namespace {

// --- answers to a request for a key; the peer chooses them and every number in them ---

struct Answer {
  VerbsMapReply head{};
  std::vector<uint32_t> rkeys;

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all(sizeof head);
    std::memcpy(all.data(), &head, sizeof head);
    const auto tail = std::as_bytes(std::span(rkeys));
    all.insert(all.end(), tail.begin(), tail.end());
    return all;
  }
};

Answer good_answer() {
  Answer answer;
  answer.head.op = static_cast<uint8_t>(VerbsOp::kMapReply);
  answer.head.status = static_cast<uint8_t>(wire::OpStatus::kOk);
  answer.head.access = static_cast<uint8_t>(Access::kRead);
  answer.head.chunk_count = 3;
  answer.head.length = (160 << 20) + 1;
  answer.head.key = 77;
  answer.head.chunk_bytes = 64 << 20;
  answer.head.address = 0x7f0000000000;
  answer.rkeys = {1, 2, 3};
  return answer;
}

class VerbsKeys : public testing::Test {
 protected:
  RemoteKeys::Entry* accept(const Answer& answer) { return keys_.accept(answer.bytes(), &result_); }
  void ask() {
    RemoteKeys::Entry* entry = keys_.find_or_add(77);
    ASSERT_NE(entry, nullptr);
    ASSERT_EQ(keys_.next_unasked(), entry);
    entry->state = RemoteKeys::State::kAsked;
  }
  RemoteKeys keys_;
  OpResult result_{};
};

TEST_F(VerbsKeys, AnAnswerOpensTheKeyOnce) {
  EXPECT_EQ(accept(good_answer()), nullptr) << "nobody asked";
  ask();
  const RemoteKeys::Entry* entry = accept(good_answer());
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(result_, OpResult::kOk);
  EXPECT_EQ(entry->state, RemoteKeys::State::kOpen);
  EXPECT_EQ(entry->chunks.key_at((128 << 20) - 1), 2u);
  EXPECT_EQ(entry->chunks.key_at(128 << 20), 3u);
  EXPECT_EQ(entry->chunks.left_in_chunk((64 << 20) - 5), 5u);
  EXPECT_EQ(accept(good_answer()), nullptr) << "answered before";
}

TEST_F(VerbsKeys, ARefusalFreesTheKey) {
  ask();
  Answer refusal;
  refusal.head.op = static_cast<uint8_t>(VerbsOp::kMapReply);
  refusal.head.status = static_cast<uint8_t>(wire::OpStatus::kBadKey);
  refusal.head.key = 77;
  ASSERT_NE(accept(refusal), nullptr);
  EXPECT_EQ(result_, OpResult::kBadKey);
  EXPECT_EQ(keys_.next_unasked(), nullptr);
  ask();
}

TEST_F(VerbsKeys, InconsistentAnswersAreRefused) {
  ask();
  const auto with = [](auto change) {
    Answer answer = good_answer();
    change(answer);
    return answer;
  };
  const Answer bad[] = {
      with([](Answer& a) { a.head.key = 78; }),
      with([](Answer& a) { a.head.status = 99; }),
      with([](Answer& a) { a.head.status = static_cast<uint8_t>(wire::OpStatus::kAbsent); }),
      with([](Answer& a) { a.head.access = 0; }),
      with([](Answer& a) { a.head.access = 3; }),
      with([](Answer& a) { a.head.reserved = 1; }),
      with([](Answer& a) { a.head.length = 0; }),
      with([](Answer& a) { a.head.length = UINT64_MAX; }),
      with([](Answer& a) { a.head.address = UINT64_MAX - 4096; }),
      with([](Answer& a) { a.head.chunk_bytes = 0; }),
      with([](Answer& a) { a.head.chunk_bytes = wire::kTransferBytesMax - 1; }),
      with([](Answer& a) { a.head.chunk_bytes = UINT64_MAX; }),
      with([](Answer& a) { a.head.chunk_count = 2; }),
      with([](Answer& a) { a.head.chunk_count = 0; }),
      with([](Answer& a) { a.head.chunk_count = UINT32_MAX; }),
      with([](Answer& a) { a.rkeys.pop_back(); }),
      with([](Answer& a) { a.rkeys.push_back(4); }),
      with([](Answer& a) { a.head.status = static_cast<uint8_t>(wire::OpStatus::kBadKey); }),
  };
  for (size_t i = 0; i < std::size(bad); ++i) EXPECT_EQ(accept(bad[i]), nullptr) << "answer " << i;
  const auto bytes = good_answer().bytes();
  for (size_t length = 0; length < bytes.size(); ++length)
    EXPECT_EQ(keys_.accept(std::span(bytes).first(length), &result_), nullptr) << length << " bytes";
  EXPECT_NE(accept(good_answer()), nullptr) << "none of these took the question away";
}

TEST_F(VerbsKeys, ThereAreNoMoreThanASessionCanHave) {
  for (uint64_t key = 0; key < kKeysMax; ++key) ASSERT_NE(keys_.find_or_add(1000 + key), nullptr);
  EXPECT_EQ(keys_.find_or_add(7), nullptr);
  EXPECT_NE(keys_.find_or_add(1000), nullptr);
}

// --- with a device ---

class Verbs : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string missing = missing_for(kVerbsProvider); !missing.empty()) GTEST_SKIP() << missing;
    listener_ = must_listen(kVerbsProvider);
    session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
  }
  std::unique_ptr<Endpoint> must_connect(const Options& options = {}) {
    Options here = options;
    here["localAddress"] = verbs_places().value().back().address;
    return kVerbsProvider.connect(listener_->address(), credentials_, Channel::kBulk, kConnectTimeout, here)
        .value();
  }
  const Credentials credentials_ = make_credentials(1);
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
};

TEST_F(Verbs, OperationsCrossTheBordersOfChunks) {
  constexpr uint64_t kLength = (130 << 20) + 12345;
  constexpr uint64_t kChunk = 64 << 20;
  TestMemory remote(kLength), local(kLength);
  remote.fill(21);
  const RemoteKey key = session_->expose(remote.local(), Access::kReadWrite).value();
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::vector<Operation> operations;
  const auto add = [&](uint64_t local_offset, uint64_t remote_offset, uint32_t length) {
    operations.push_back(Operation{operations.size(), id, local_offset, key, remote_offset, length});
  };
  add(kChunk - 4096, kChunk - 4096, 8192);               // one border, the same on both sides
  add(kChunk - (1 << 20) + 1, 4096, 1 << 20);            // a border on this side only
  add(10 << 20, 2 * kChunk - 77, 1000);                  // a border on the other side only
  add(2 * kChunk - 300'000, kChunk - 100'000, 700'000);  // one border on either side, at different places
  add(kLength - 5, kLength - 5, 5);                      // the very end
  const auto same = [&](const Operation& operation) {
    return std::memcmp(local.base() + operation.local_offset_bytes,
                       remote.base() + operation.remote_offset_bytes, operation.length_bytes) == 0;
  };
  for (const Operation& operation : operations) {
    ASSERT_EQ(run_one(*endpoint, operation), OpResult::kOk) << operation.tag;
    EXPECT_TRUE(same(operation)) << operation.tag;
  }
  local.fill(22);
  for (const Operation& operation : operations) {
    ASSERT_EQ(run_one(*endpoint, operation, true), OpResult::kOk) << operation.tag;
    EXPECT_TRUE(same(operation)) << operation.tag;
  }
}

TEST_F(Verbs, TheSourceSpendsNoTimeOnReads) {
  TestMemory remote(8 << 20), local(8 << 20);
  remote.fill(23);
  const RemoteKey key = session_->expose(remote.local(), Access::kRead).value();
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  const auto read = [&](uint64_t offset) {
    return run_one(*endpoint, Operation{0, id, offset, key, offset, 4096});
  };
  ASSERT_EQ(read(0), OpResult::kOk);
  // The first READ asks for the key, and the thread that answers may not be asleep again yet.
  ::usleep(200'000);
  const uint64_t before_ns = session_->counters().cpu_ns;
  for (uint64_t offset = 0; offset < local.length_bytes(); offset += 4096)
    ASSERT_EQ(read(offset), OpResult::kOk);
  EXPECT_EQ(session_->counters().cpu_ns, before_ns);
}

/// The bed's cable to host 1, which listens.
class VerbsCable : public Verbs {
 protected:
  void SetUp() override {
    Verbs::SetUp();
    if (!IsSkipped() && ::access("/sys/class/net/p1", F_OK) != 0)
      GTEST_SKIP() << "needs rdma: the test bed's cables";
  }
  void TearDown() override { (void)std::system("ip link set p1 up"); }
};

TEST_F(VerbsCable, AShortCutIsBridged) {
  TestMemory remote(1 << 20), local(1 << 20);
  remote.fill(24);
  const RemoteKey key = session_->expose(remote.local(), Access::kRead).value();
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  ASSERT_EQ(run_one(*endpoint, Operation{0, id, 0, key, 0, 4096}), OpResult::kOk);
  ASSERT_EQ(std::system("ip link set p1 down; (sleep 1; ip link set p1 up) &"), 0);
  EXPECT_EQ(run_one(*endpoint, Operation{1, id, 0, key, 0, 1 << 20}), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.base(), remote.base(), 1 << 20), 0);
}

TEST_F(VerbsCable, ALongCutDisconnectsAndANewConnectionGoesOn) {
  TestMemory remote(1 << 20), local(1 << 20);
  remote.fill(25);
  const RemoteKey key = session_->expose(remote.local(), Access::kRead).value();
  // 67 ms, then two more tries: the connection is lost in a fraction of a second.
  auto endpoint = must_connect({{"ackTimeoutExponent", uint64_t{14}}, {"retryCount", uint64_t{2}}});
  LocalId id = endpoint->register_local(local.local()).value();
  ASSERT_EQ(run_one(*endpoint, Operation{0, id, 0, key, 0, 4096}), OpResult::kOk);
  ASSERT_EQ(std::system("ip link set p1 down"), 0);
  EXPECT_EQ(run_one(*endpoint, Operation{1, id, 0, key, 0, 1 << 20}), OpResult::kDisconnected);
  EXPECT_TRUE(endpoint->disconnected());
  ASSERT_EQ(std::system("ip link set p1 up"), 0);
  endpoint = must_connect();
  id = endpoint->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint, Operation{2, id, 0, key, 0, 1 << 20}), OpResult::kOk);
  EXPECT_EQ(std::memcmp(local.base(), remote.base(), 1 << 20), 0);
}

}  // namespace
}  // namespace vmigrate::transport

#endif
