// Tests the start and the end of connections, sessions, listeners and whole processes.

#include <signal.h>
#include <sys/wait.h>

#include <atomic>
#include <cstdio>
#include <thread>

#include "tests/transport/compliance.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

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
  // The socket file of a killed listener does not prevent the next one.
  if (provider().host_is_path) {
    EXPECT_TRUE(listen_at(provider(), child_address).ok());
  }
}

TEST_P(TransportCompliance, ConnectingAgainAndAgainLeavesNothingBehind) {
  listen();
  { const auto warm_up = must_connect(); }
  ASSERT_TRUE(eventually([&] { return session_->counters().connections == 0; }));
  const size_t fds = count_entries("/proc/self/fd");
  const size_t threads = count_entries("/proc/self/task");
  // What a connection leaves behind is seen after a hundred of them, and sanitizers make each one slow.
  for (int i = 0; i < 200; ++i) {
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

}  // namespace
}  // namespace vmigrate::transport
