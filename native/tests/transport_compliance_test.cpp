// The transport contract in executable form. Each provider passes it bare and under the faulty decorator.

#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

#include "tests/transport_fixture.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

struct Case {
  Provider provider;
  bool faulty;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  return std::string(name_of(info.param.provider)) + (info.param.faulty ? "_faulty" : "_bare");
}

constexpr uint64_t kRegionBytes = 8 << 20;

class TransportCompliance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (const std::string missing = missing_for(provider()); !missing.empty()) GTEST_SKIP() << missing;
  }
  Provider provider() const { return GetParam().provider; }

  void listen() {
    listener_ = must_listen(provider());
    session_ = must_expose(credentials_);
  }
  std::unique_ptr<ExposedSession> must_expose(const Credentials& credentials,
                                              MessageHandler handler = nullptr, void* context = nullptr) {
    auto session = listener_->expose_session(credentials, handler, context);
    EXPECT_TRUE(session.ok());
    return std::move(session).value();
  }
  std::unique_ptr<Endpoint> must_connect(Channel channel = Channel::kDemand) {
    return must_connect(listener_->address(), credentials_, channel);
  }
  std::unique_ptr<Endpoint> must_connect(const Address& address, const Credentials& credentials,
                                         Channel channel = Channel::kDemand) {
    auto endpoint = connect(provider(), address, credentials, channel);
    EXPECT_TRUE(endpoint.ok()) << endpoint.error().what << " errno " << endpoint.error().system_errno;
    return decorate(std::move(endpoint).value());
  }
  std::unique_ptr<Endpoint> decorate(std::unique_ptr<Endpoint> endpoint) {
    if (!GetParam().faulty) return endpoint;
    FaultyOptions options;
    options.seed = 7;
    options.completion_delay_polls_max = 4;
    options.reorder_completions = true;
    options.would_block_permille = 200;
    options.short_batches = true;
    auto faulty = make_faulty(std::move(endpoint), options);
    EXPECT_TRUE(faulty.ok());
    return std::move(faulty).value();
  }
  RemoteKey must_expose_memory(const TestMemory& memory, Access access = Access::kRead) {
    auto key = session_->expose(memory.local(), access);
    EXPECT_TRUE(key.ok());
    return key.value();
  }

  const Credentials credentials_ = make_credentials(1);
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
};

Operation make_operation(uint64_t tag, LocalId local, uint64_t local_offset, const RemoteKey& key,
                         uint64_t remote_offset, uint64_t length_bytes) {
  return Operation{tag, local, local_offset, key, remote_offset, static_cast<uint32_t>(length_bytes)};
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

TEST_P(TransportCompliance, RefusesWhatTheKeyDoesNotCover) {
  TestMemory remote(1 << 20), other(1 << 20), local(1 << 20);
  listen();
  const auto other_session = must_expose(make_credentials(2));
  const RemoteKey key = must_expose_memory(remote);
  const RemoteKey other_key = other_session->expose(other.local(), Access::kRead).value();
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  RemoteKey bad_key = key;
  bad_key.key ^= 1;
  struct {
    RemoteKey key;
    uint64_t offset;
    uint32_t length;
    OpResult expected;
  } const cases[] = {
      {bad_key, 0, 4096, OpResult::kBadKey},        {RemoteKey{}, 0, 4096, OpResult::kBadKey},
      {other_key, 0, 4096, OpResult::kBadKey},      {key, (1 << 20) - 4095, 4096, OpResult::kOutOfRange},
      {key, 1 << 20, 1, OpResult::kOutOfRange},     {key, UINT64_MAX - 4095, 4096, OpResult::kOutOfRange},
      {key, UINT64_MAX, 1, OpResult::kOutOfRange},  {key, 0, 0, OpResult::kOutOfRange},
      {key, (1 << 20) - 4096, 4096, OpResult::kOk}, {key, 0, 1 << 20, OpResult::kOk},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(run_one(*endpoint, make_operation(9, id, 0, c.key, c.offset, c.length)), c.expected)
        << "offset " << c.offset << " length " << c.length;
  }
  EXPECT_FALSE(endpoint->disconnected());
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

TEST_P(TransportCompliance, ExposesOnlyWhatCanBeServed) {
  listen();
  std::vector<std::byte> plain(4096);
  const auto without_file = session_->expose(LocalMemory{plain.data(), -1, 0, plain.size()}, Access::kRead);
  if (provider() == Provider::kShm)
    EXPECT_EQ(without_file.error().code, ErrorCode::kInvalidArgument);
  else
    EXPECT_TRUE(without_file.ok());
  TestMemory memory(4096);
  LocalMemory bad = memory.local();
  bad.length_bytes = 0;
  EXPECT_EQ(session_->expose(bad, Access::kRead).error().code, ErrorCode::kInvalidArgument);
  bad = memory.local();
  bad.length_bytes = 8192;
  EXPECT_EQ(session_->expose(bad, Access::kRead).error().code, ErrorCode::kRegionChanged);
  bad = memory.local();
  bad.fd_offset_bytes = UINT64_MAX - 100;
  EXPECT_EQ(session_->expose(bad, Access::kRead).error().code, ErrorCode::kInvalidArgument);
  for (;;) {
    const auto key = session_->expose(memory.local(), Access::kRead);
    if (key.ok()) continue;
    EXPECT_EQ(key.error().code, ErrorCode::kInvalidArgument);
    break;
  }
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
  if (provider() == Provider::kTcp) {
    EXPECT_EQ(session_->counters().read_bytes, kRegionBytes);
    EXPECT_EQ(session_->counters().read_count, kRegionBytes / 2 / 4096 + kRegionBytes / 2 / (256 << 10));
    EXPECT_GT(session_->counters().cpu_ns, 0u);
  } else {
    EXPECT_EQ(session_->counters().read_count, 0u);  // the source cannot know
  }
}

struct Inbox {
  std::mutex mutex;
  std::vector<std::vector<std::byte>> messages;
  Channel channel{};
  static void handle(void* context, Channel channel, std::span<const std::byte> message) {
    auto* self = static_cast<Inbox*>(context);
    const std::lock_guard lock(self->mutex);
    self->channel = channel;
    self->messages.emplace_back(message.begin(), message.end());
  }
  size_t count() {
    const std::lock_guard lock(mutex);
    return messages.size();
  }
};

TEST_P(TransportCompliance, MessagesBothWaysAndInOrder) {
  listener_ = must_listen(provider());
  Inbox inbox;
  session_ = must_expose(credentials_, &Inbox::handle, &inbox);
  EXPECT_EQ(session_->send(Channel::kDemand, std::as_bytes(std::span("x"))), PostStatus::kDisconnected);
  const auto endpoint = must_connect(Channel::kBulk);
  std::mt19937 random(3);
  std::vector<std::vector<std::byte>> sent;
  for (size_t i = 0; i < 100; ++i) {
    const size_t length = i == 50 ? wire::kMessageBytesMax : 1 + random() % 900;
    sent.emplace_back(length, static_cast<std::byte>(i));
    ASSERT_TRUE(send_message(*endpoint, sent.back()));
  }
  ASSERT_TRUE(eventually([&] {
    (void)endpoint->poll({});  // flushes
    return inbox.count() == sent.size();
  }));
  EXPECT_EQ(inbox.messages, sent);
  EXPECT_EQ(inbox.channel, Channel::kBulk);

  std::thread sender([&] {
    for (const auto& message : sent) {
      EXPECT_TRUE(eventually([&] { return session_->send(Channel::kBulk, message) == PostStatus::kPosted; }));
    }
  });
  for (const auto& message : sent) ASSERT_EQ(receive_message(*endpoint), message);
  sender.join();
}

TEST_P(TransportCompliance, MessagesThatNobodyTakesBlockTheSenderAndNothingIsLost) {
  listen();
  TestMemory remote(4096), local(4096);
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  const std::vector<std::byte> message(wire::kMessageBytesMax, std::byte{1});
  size_t sent = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
  while (std::chrono::steady_clock::now() < end && sent < 20'000) {
    if (session_->send(Channel::kDemand, message) == PostStatus::kPosted)
      ++sent;
    else
      ::usleep(1000);
  }
  EXPECT_GE(sent, kMessagesQueuedMax);
  for (size_t i = 0; i < sent; ++i) ASSERT_EQ(receive_message(*endpoint), message) << i << " of " << sent;
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 4096)), OpResult::kOk);
}

TEST_P(TransportCompliance, MessageLargerThanTheReceiversBufferDisconnects) {
  listen();
  const auto endpoint = must_connect();
  const std::vector<std::byte> message(100, std::byte{1});
  ASSERT_EQ(session_->send(Channel::kDemand, message), PostStatus::kPosted);
  ASSERT_TRUE(wait_ready(*endpoint, kPatience));
  std::byte small[99];
  EXPECT_TRUE(eventually([&] {
    EXPECT_EQ(endpoint->receive(small), 0u);
    return endpoint->disconnected();
  }));
}

TEST_P(TransportCompliance, WrongCredentialsAreRefused) {
  listen();
  Credentials wrong_token = credentials_;
  wrong_token.token.back() ^= 1;
  Credentials wrong_session = credentials_;
  wrong_session.session.front() ^= 1;
  for (const Credentials& wrong : {wrong_token, wrong_session, Credentials{}}) {
    const auto endpoint = connect(provider(), listener_->address(), wrong);
    ASSERT_FALSE(endpoint.ok());
    EXPECT_EQ(endpoint.error().code, ErrorCode::kRefused);
  }
  const auto bad_channel = connect(provider(), listener_->address(), credentials_, static_cast<Channel>(9));
  ASSERT_FALSE(bad_channel.ok());
  EXPECT_EQ(bad_channel.error().code, ErrorCode::kRefused);
  EXPECT_TRUE(eventually([&] { return listener_->rejected_hellos() == 4; }));
  EXPECT_EQ(session_->counters().connections, 0u);
  EXPECT_FALSE(must_connect()->disconnected());
}

TEST_P(TransportCompliance, SessionsAreApart) {
  listen();
  const auto duplicate = listener_->expose_session(credentials_, nullptr, nullptr);
  ASSERT_FALSE(duplicate.ok());
  EXPECT_EQ(duplicate.error().code, ErrorCode::kAlreadyExists);
  auto second = must_expose(make_credentials(2));
  TestMemory remote(4096), local(4096);
  remote.fill(9);
  const RemoteKey key = second->expose(remote.local(), Access::kRead).value();
  const auto endpoint = must_connect(listener_->address(), make_credentials(2));
  const LocalId id = endpoint->register_local(local.local()).value();
  session_.reset();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 4096)), OpResult::kOk);
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), 4096), 0);
  session_ = must_expose(credentials_);
  second.reset();
  EXPECT_TRUE(wait_disconnected(*endpoint));
}

TEST_P(TransportCompliance, DisconnectsWhenTheSessionEndsWhileReadsAreUnderWay) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  std::atomic<bool> running{false};
  std::thread reader([&] {
    uint64_t posted = 0, completed = 0;
    while (!endpoint->disconnected()) {
      const Operation operation =
          make_operation(posted, id, (posted % 8) << 20, key, (posted % 8) << 20, 1 << 20);
      posted += endpoint->read(std::span(&operation, 1)).posted;
      Completion batch[4];
      const size_t count = endpoint->poll(batch);
      for (size_t i = 0; i < count; ++i)
        EXPECT_TRUE(batch[i].result == OpResult::kOk || batch[i].result == OpResult::kDisconnected);
      completed += count;
      if (completed > 3) running = true;
    }
    while (completed < posted) {
      Completion batch[4];
      const size_t count = endpoint->poll(batch);
      ASSERT_GT(count, 0u) << "an operation never completed";
      completed += count;
    }
    const Operation late = make_operation(0, id, 0, key, 0, 4096);
    EXPECT_EQ(endpoint->read(std::span(&late, 1)).status, PostStatus::kDisconnected);
    const std::byte byte{};
    EXPECT_EQ(endpoint->send(std::span(&byte, 1)), PostStatus::kDisconnected);
    EXPECT_TRUE(wait_ready(*endpoint, std::chrono::milliseconds(0)));
  });
  EXPECT_TRUE(eventually([&] { return running.load(); }));
  session_.reset();
  reader.join();
}

TEST_P(TransportCompliance, AnIdlePeerLearnsThatTheSessionEnded) {
  listen();
  const auto endpoint = must_connect();
  EXPECT_FALSE(wait_ready(*endpoint, std::chrono::milliseconds(50)));
  session_.reset();
  EXPECT_TRUE(wait_ready(*endpoint, kPatience));
  EXPECT_TRUE(wait_disconnected(*endpoint));
}

TEST_P(TransportCompliance, AListenerGoesAfterItsSessionsAndTakesItsAddressAlong) {
  listen();
  const Address address = listener_->address();
  auto endpoint = must_connect();
  session_.reset();
  listener_.reset();
  EXPECT_TRUE(wait_disconnected(*endpoint));
  EXPECT_FALSE(connect(provider(), address, credentials_).ok());
  // The address can be used again at once.
  auto again = listen_at(provider(), address);
  EXPECT_TRUE(again.ok());
}

TEST_P(TransportCompliance, AnEndpointMayGoWithOperationsUnderWay) {
  TestMemory remote(kRegionBytes), local(kRegionBytes);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  for (uint64_t i = 0; i < 8; ++i) {
    const Operation operation = make_operation(i, id, i << 20, key, i << 20, 1 << 20);
    (void)endpoint->read(std::span(&operation, 1));
  }
  endpoint.reset();
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(TransportCompliance, SurvivesAPeerThatIsKilled) {
  int pipes[2];
  ASSERT_EQ(::pipe(pipes), 0);
  struct {
    char host[108];
    uint16_t port;
    RemoteKey key;
  } note{};
  const Address child_address = listen_address(provider());
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    auto listener = listen_at(provider(), child_address);
    auto session = listener.value()->expose_session(credentials_, nullptr, nullptr);
    TestMemory remote(kRegionBytes);
    remote.fill(10);
    note.key = session.value()->expose(remote.local(), Access::kRead).value();
    note.port = listener.value()->address().port;
    std::snprintf(note.host, sizeof note.host, "%s", child_address.host.c_str());
    if (::write(pipes[1], &note, sizeof note) != sizeof note) ::_exit(1);
    for (;;) ::pause();
  }
  ASSERT_EQ(::read(pipes[0], &note, sizeof note), static_cast<ssize_t>(sizeof note));
  TestMemory local(kRegionBytes);
  const auto endpoint = must_connect(Address{note.host, note.port}, credentials_);
  const LocalId id = endpoint->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, note.key, 0, 4096)), OpResult::kOk);
  uint64_t posted = 0, completed = 0;
  const auto kill_at = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  bool killed = false;
  while (!endpoint->disconnected()) {
    const Operation operation = make_operation(posted, id, 0, note.key, 0, 1 << 20);
    posted += endpoint->read(std::span(&operation, 1)).posted;
    Completion batch[8];
    completed += endpoint->poll(batch);
    if (!killed && std::chrono::steady_clock::now() > kill_at) {
      ASSERT_EQ(::kill(child, SIGKILL), 0);
      killed = true;
    }
  }
  while (completed < posted) {
    Completion batch[8];
    const size_t count = endpoint->poll(batch);
    ASSERT_GT(count, 0u);
    completed += count;
  }
  EXPECT_TRUE(killed);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ::close(pipes[0]);
  ::close(pipes[1]);
  // What a killed shm listener left behind is no obstacle to the next one.
  if (provider() == Provider::kShm) {
    EXPECT_TRUE(listen_shm(child_address).ok());
  }
}

TEST_P(TransportCompliance, NoSpaceOnTheLocalSideIsAResult) {
  char directory[] = "/tmp/vmigrate-nospace-XXXXXX";
  ASSERT_NE(::mkdtemp(directory), nullptr);
  if (::mount("tmpfs", directory, "tmpfs", 0, "size=1m") != 0) {
    ::rmdir(directory);
    GTEST_SKIP() << "cannot mount a small tmpfs here: " << std::strerror(errno);
  }
  {
    listen();
    TestMemory remote(4 << 20);
    remote.fill(11);
    const RemoteKey key = must_expose_memory(remote);
    TestMemory local(4 << 20, std::string(directory) + "/region");
    const auto endpoint = must_connect();
    if (provider() == Provider::kVerbs) {
      // Pinning takes all pages at once, so it shows early.
      EXPECT_EQ(endpoint->register_local(local.local()).error().code, ErrorCode::kNoSpace);
      EXPECT_EQ(::umount2(directory, MNT_DETACH), 0);
      ::rmdir(directory);
      return;
    }
    const LocalId id = endpoint->register_local(local.local()).value();
    EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 512 << 10)), OpResult::kOk);
    EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 1 << 20, key, 1 << 20, 1 << 20)), OpResult::kNoSpace);
    // What has its pages is not hurt, and the connection goes on.
    EXPECT_EQ(run_one(*endpoint, make_operation(3, id, 0, key, 0, 4096)), OpResult::kOk);
    EXPECT_EQ(std::memcmp(remote.base(), local.base(), 512 << 10), 0);
  }
  EXPECT_EQ(::umount2(directory, MNT_DETACH), 0);
  ::rmdir(directory);
}

TEST_P(TransportCompliance, AFileThatShrinksIsAnIoErrorOnEitherSide) {
  if (provider() == Provider::kVerbs) {
    // The device holds the pages that the file has let go: no error, and no signal either.
    TestMemory kept(2 << 20), landing(2 << 20);
    kept.fill(12);
    const std::vector<std::byte> before(kept.base(), kept.base() + kept.length_bytes());
    listen();
    const RemoteKey kept_key = must_expose_memory(kept);
    const auto reader = must_connect();
    const LocalId landing_id = reader->register_local(landing.local()).value();
    ASSERT_EQ(::ftruncate(kept.fd(), 1 << 20), 0);
    EXPECT_EQ(run_one(*reader, make_operation(1, landing_id, 0, kept_key, 1 << 20, 1 << 20)), OpResult::kOk);
    EXPECT_EQ(std::memcmp(landing.base(), before.data() + (1 << 20), 1 << 20), 0);
    return;
  }
  TestMemory remote(2 << 20), local(2 << 20);
  remote.fill(12);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 4096)), OpResult::kOk);
  ASSERT_EQ(::ftruncate(remote.fd(), 1 << 20), 0);
  EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 0, key, (1 << 20) - 4096, 8192)), OpResult::kIoError);
  EXPECT_EQ(run_one(*endpoint, make_operation(3, id, 0, key, 1 << 20, 1 << 20)), OpResult::kIoError);
  EXPECT_EQ(run_one(*endpoint, make_operation(4, id, 0, key, 0, 1 << 20)), OpResult::kOk);
  ASSERT_EQ(::ftruncate(local.fd(), 65536), 0);
  EXPECT_EQ(run_one(*endpoint, make_operation(5, id, 65536, key, 0, 4096)), OpResult::kIoError);
  EXPECT_EQ(run_one(*endpoint, make_operation(6, id, 0, key, 0, 1 << 20)), OpResult::kIoError);
  struct stat info {};
  ASSERT_EQ(::fstat(local.fd(), &info), 0);
  EXPECT_EQ(info.st_size, 65536) << "a file that was cut must not grow again by our hand";
  EXPECT_EQ(run_one(*endpoint, make_operation(7, id, 0, key, 0, 65536)), OpResult::kOk);
  EXPECT_FALSE(endpoint->disconnected());
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
  std::ifstream before_file("/proc/sys/vm/nr_hugepages");
  unsigned long before = 0;
  before_file >> before;
  std::ofstream("/proc/sys/vm/nr_hugepages") << before + 8;
  unsigned long now = 0;
  std::ifstream("/proc/sys/vm/nr_hugepages") >> now;
  if (now < before + 4) {
    std::ofstream("/proc/sys/vm/nr_hugepages") << before;
    GTEST_SKIP() << "no huge pages can be reserved here";
  }
  {
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
  std::ofstream("/proc/sys/vm/nr_hugepages") << before;
}

TEST_P(TransportCompliance, EventFdWorksInsideEpoll) {
  TestMemory remote(65536), local(65536);
  listen();
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  const UniqueFd outer(::epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  ASSERT_EQ(::epoll_ctl(outer.get(), EPOLL_CTL_ADD, endpoint->event_fd(), &event), 0);
  EXPECT_EQ(::epoll_wait(outer.get(), &event, 1, 20), 0) << "ready with nothing to tell";
  for (uint64_t round = 0; round < 100; ++round) {
    const Operation operation = make_operation(round, id, 0, key, 0, 4096);
    while (endpoint->read(std::span(&operation, 1)).posted == 0) ASSERT_FALSE(endpoint->disconnected());
    size_t done = 0;
    while (done == 0) {
      ASSERT_EQ(::epoll_wait(outer.get(), &event, 1, 5000), 1) << "round " << round;
      Completion completion;
      done = endpoint->poll(std::span(&completion, 1));
    }
  }
  Completion completion;
  EXPECT_EQ(endpoint->poll(std::span(&completion, 1)), 0u);
  EXPECT_EQ(::epoll_wait(outer.get(), &event, 1, 20), 0) << "ready with nothing to tell";
}

TEST_P(TransportCompliance, ConnectingAThousandTimesLeavesNothingBehind) {
  listen();
  { const auto warm_up = must_connect(); }
  ASSERT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
  const size_t fds = count_entries("/proc/self/fd");
  const size_t threads = count_entries("/proc/self/task");
  for (int i = 0; i < 1000; ++i) {
    const auto endpoint = must_connect(i % 2 ? Channel::kDemand : Channel::kBulk);
    ASSERT_FALSE(endpoint->disconnected());
  }
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
  // A finished connection keeps its eventfd until the next one comes.
  EXPECT_LE(count_entries("/proc/self/fd"), fds + 2 * kConnectionsMax);
  EXPECT_TRUE(eventually([&] { return count_entries("/proc/self/task") <= threads; }));
  session_.reset();
  listener_.reset();
  EXPECT_LT(count_entries("/proc/self/fd"), fds);
}

TEST_P(TransportCompliance, TheNewestConnectionWins) {
  listen();
  std::vector<std::unique_ptr<Endpoint>> endpoints;
  for (size_t i = 0; i < 2 * kConnectionsMax; ++i) {
    endpoints.push_back(must_connect());
    const size_t gone = endpoints.size() > kConnectionsMax ? endpoints.size() - kConnectionsMax : 0;
    if (gone > 0) {
      EXPECT_TRUE(wait_disconnected(*endpoints[gone - 1]));
    }
  }
  const std::byte byte{5};
  ASSERT_EQ(session_->send(Channel::kDemand, std::span(&byte, 1)), PostStatus::kPosted);
  EXPECT_EQ(receive_message(*endpoints.back()).size(), 1u);
}

INSTANTIATE_TEST_SUITE_P(Providers, TransportCompliance,
                         testing::Values(Case{Provider::kTcp, false}, Case{Provider::kTcp, true},
                                         Case{Provider::kShm, false}, Case{Provider::kShm, true},
                                         Case{Provider::kVerbs, false}, Case{Provider::kVerbs, true}),
                         case_name);

class FaultyDecorator : public testing::TestWithParam<Provider> {
 protected:
  void SetUp() override {
    if (const std::string missing = missing_for(GetParam()); !missing.empty()) GTEST_SKIP() << missing;
    listener_ = must_listen(GetParam());
    session_ = listener_->expose_session(make_credentials(1), nullptr, nullptr).value();
    key_ = session_->expose(remote_.local(), Access::kRead).value();
  }
  void connect_with(const FaultyOptions& options) {
    auto endpoint = connect(GetParam(), listener_->address(), make_credentials(1));
    ASSERT_TRUE(endpoint.ok());
    endpoint_ = make_faulty(std::move(endpoint).value(), options).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
    for (uint64_t i = 0; i < 16; ++i)
      operations_.push_back(make_operation(i, local_id_, i * 4096, key_, i * 4096, 4096));
  }
  TestMemory remote_{65536}, local_{65536};
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
  std::unique_ptr<Endpoint> endpoint_;
  LocalId local_id_{};
  std::vector<Operation> operations_;
};

TEST_P(FaultyDecorator, FailsTheOperationThatIsAskedFor) {
  FaultyOptions options;
  options.failed_operation = 5;
  options.failed_result = OpResult::kNoSpace;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  ASSERT_EQ(completions.size(), 16u);
  for (const Completion& completion : completions)
    EXPECT_EQ(completion.result, completion.tag == 5 ? OpResult::kNoSpace : OpResult::kOk);
}

TEST_P(FaultyDecorator, DisconnectsAfterTheOperationThatIsAskedFor) {
  FaultyOptions options;
  options.disconnect_after_operations = 7;
  options.completion_delay_polls_max = 3;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  EXPECT_EQ(completions.size(), 7u);
  EXPECT_TRUE(endpoint_->disconnected());
  EXPECT_EQ(endpoint_->read(operations_).status, PostStatus::kDisconnected);
  EXPECT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
}

TEST_P(FaultyDecorator, ReordersCompletions) {
  FaultyOptions options;
  options.seed = 3;
  options.reorder_completions = true;
  options.completion_delay_polls_max = 8;
  connect_with(options);
  const auto completions = run_all(*endpoint_, operations_);
  ASSERT_EQ(completions.size(), 16u);
  EXPECT_FALSE(std::is_sorted(completions.begin(), completions.end(),
                              [](const Completion& a, const Completion& b) { return a.tag < b.tag; }));
}

INSTANTIATE_TEST_SUITE_P(Providers, FaultyDecorator,
                         testing::Values(Provider::kTcp, Provider::kShm, Provider::kVerbs),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace vmigrate::transport
