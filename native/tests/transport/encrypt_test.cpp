// Tests encrypted connections against somebody who listens, and against somebody in the middle who changes
// records. He sees no byte of memory, and nothing that he has changed takes effect.

#include <algorithm>

#include "tests/transport/hostile_fixture.hpp"
#include "tests/transport/relay.hpp"
#include "transport/tls.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kEncryptedBytes = 1 << 20;
constexpr uint32_t kEncryptedPage = 4096;
/// More records than a handshake has.
constexpr size_t kAfterHandshake = 12;

class Encrypt : public testing::Test {
 protected:
  void SetUp() override {
    remote_.fill(1);
    listener_ = must_listen(kTcpProvider);
    session_ = listener_->expose_session(credentials_, nullptr, nullptr).value();
    key_ = session_->expose(remote_.local(), Access::kReadWrite).value();
  }
  void TearDown() override {
    endpoint_.reset();
    relay_.reset();
  }
  // Whether the target has connected.
  bool open(Relay::Options options) {
    endpoint_.reset();
    relay_.reset();
    local_.fill(2);
    options.is_encrypted = true;
    relay_ = std::make_unique<Relay>(listener_->address(), std::move(options));
    auto endpoint = connect(kTcpProvider, relay_->address(), credentials_);
    if (!endpoint.ok()) return false;
    endpoint_ = std::move(endpoint).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
    return true;
  }
  std::vector<Operation> pages(uint64_t count) const {
    std::vector<Operation> all;
    for (uint64_t i = 0; i < count; ++i)
      all.push_back(Operation{i, local_id_, i * kEncryptedPage, key_, i * kEncryptedPage, kEncryptedPage});
    return all;
  }
  bool page_is_right(uint64_t index) const {
    return std::memcmp(local_.base() + index * kEncryptedPage, remote_.base() + index * kEncryptedPage,
                       kEncryptedPage) == 0;
  }
  // Whether all pages came. Those that complete are right.
  bool read_all(uint64_t page_count) {
    bool is_whole = true;
    for (const Completion& completion : run_all(*endpoint_, pages(page_count))) {
      is_whole = is_whole && completion.result == OpResult::kOk;
      if (completion.result == OpResult::kOk)
        EXPECT_TRUE(page_is_right(completion.tag)) << "page " << completion.tag;
      else
        EXPECT_EQ(completion.result, OpResult::kDisconnected);
    }
    return is_whole;
  }
  // The same, each page in a record of its own: a record that is missing shows when another one comes.
  bool read_each(uint64_t page_count) {
    for (const Operation& operation : pages(page_count))
      if (endpoint_->read(std::span(&operation, 1)).posted != 1) return false;
    uint64_t done_count = 0, right_count = 0;
    EXPECT_TRUE(eventually([&] {
      Completion completion;
      while (endpoint_->poll(std::span(&completion, 1)) == 1) {
        ++done_count;
        if (completion.result == OpResult::kOk) ++right_count;
        EXPECT_TRUE(completion.result != OpResult::kOk || page_is_right(completion.tag));
      }
      return done_count == page_count;
    }));
    return right_count == page_count;
  }

  const Credentials credentials_ = make_credentials(1, Security::kEncrypt);
  TestMemory remote_{kEncryptedBytes};
  TestMemory local_{kEncryptedBytes};
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
  std::unique_ptr<Relay> relay_;
  std::unique_ptr<Endpoint> endpoint_;
  LocalId local_id_{};
};

bool contains(const std::vector<Bytes>& records, std::span<const std::byte> needle) {
  return std::any_of(records.begin(), records.end(), [&](const Bytes& record) {
    return std::search(record.begin(), record.end(), needle.begin(), needle.end()) != record.end();
  });
}

TEST_F(Encrypt, WhoeverListensSeesNoByteOfMemoryAndNoKey) {
  ASSERT_TRUE(open({.cuts = true}));
  ASSERT_TRUE(read_all(64));
  for (const Completion& completion : run_all(*endpoint_, pages(64), /*is_write=*/true))
    EXPECT_EQ(completion.result, OpResult::kOk);
  for (const Way way : {Way::kToSource, Way::kToTarget}) {
    const std::vector<Bytes> records = relay_->recorded(way);
    EXPECT_GT(records.size(), 4u);
    for (uint64_t page = 0; page < 64; ++page)
      EXPECT_FALSE(contains(records, {remote_.base() + page * kEncryptedPage, 16})) << "page " << page;
    EXPECT_FALSE(contains(records, std::as_bytes(std::span(&key_.key, 1))));
    EXPECT_FALSE(contains(records, std::as_bytes(std::span(credentials_.token))));
  }
}

TEST_F(Encrypt, AChangedRepeatedOrDroppedRecordEndsTheConnection) {
  for (const Way way : {Way::kToSource, Way::kToTarget}) {
    SCOPED_TRACE(way == Way::kToSource ? "requests" : "replies");
    const size_t due = kAfterHandshake;
    const std::function<std::vector<Bytes>(const Bytes&)> changes[] = {
        [](const Bytes& record) {
          Bytes spoiled = record;
          spoiled.back() ^= std::byte{1};
          return std::vector<Bytes>{spoiled};
        },
        [](const Bytes& record) {
          return std::vector<Bytes>{record, record};
        },
        [](const Bytes&) { return std::vector<Bytes>{}; },
    };
    for (const auto& change : changes) {
      ASSERT_TRUE(open({.alter = [=](Way to, size_t index, const Bytes& record) {
        return to == way && index == due ? change(record) : std::vector<Bytes>{record};
      }}));
      EXPECT_FALSE(read_each(64));
      EXPECT_TRUE(wait_disconnected(*endpoint_));
    }
  }
}

TEST_F(Encrypt, WhateverIsChangedNoWrongPageCompletes) {
  int lost_count = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    auto random = std::make_shared<std::mt19937_64>(seed);
    const Way way = seed % 2 == 0 ? Way::kToSource : Way::kToTarget;
    const size_t spoiled_index = (*random)() % 20;
    Relay::Options options{.cuts = true, .seed = seed};
    options.alter = [=](Way to, size_t index, const Bytes& record) {
      Bytes changed = record;
      // The type and the version of the outer record say nothing, and nobody relies on them.
      if (to == way && index == spoiled_index && changed.size() > 5)
        changed[5 + (*random)() % (changed.size() - 5)] ^= static_cast<std::byte>(1 + (*random)() % 255);
      return std::vector<Bytes>{changed};
    };
    if (!open(std::move(options)) || !read_all(64)) ++lost_count;
    if (HasFailure()) return;
  }
  EXPECT_GT(lost_count, 30);
}

TEST_F(Encrypt, ARecordedConnectionIsWorthless) {
  ASSERT_TRUE(open({}));
  ASSERT_TRUE(read_all(16));
  const std::vector<Bytes> records = relay_->recorded(Way::kToSource);
  const uint64_t served_count = session_->counters().read_count;
  ASSERT_EQ(served_count, 16u);
  // The right hello, and behind it what an earlier connection has sent.
  ASSERT_FALSE(open({.alter = [&](Way way, size_t index, const Bytes& record) {
    return std::vector<Bytes>{way == Way::kToSource && index < records.size() ? records[index] : record};
  }}));
  EXPECT_EQ(session_->counters().read_count, served_count);
}

TEST_F(Encrypt, AnotherKeyOpensNothing) {
  int sockets[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, sockets), 0);
  const UniqueFd ends[] = {UniqueFd(sockets[0]), UniqueFd(sockets[1])};
  for (const bool is_same : {true, false}) {
    FrameKey key{}, other{};
    other[5] = is_same ? 0 : 1;
    auto target = Tls::create(ends[0].get(), End::kTarget, key);
    auto source = Tls::create(ends[1].get(), End::kSource, other);
    ASSERT_TRUE(target.ok() && source.ok());
    int last_target = 1, last_source = 1;
    for (int i = 0; i < 20; ++i) {
      if (last_target > 0) last_target = target.value()->handshake();
      if (last_source > 0) last_source = source.value()->handshake();
    }
    EXPECT_EQ(last_target == 0 && last_source == 0, is_same);
    EXPECT_EQ(last_source == 0, is_same);
  }
}

}  // namespace
}  // namespace vmigrate::transport
