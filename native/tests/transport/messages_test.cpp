// Tests small messages, and the event descriptor that announces them and everything else.

#include <sys/epoll.h>

#include <mutex>
#include <random>
#include <thread>

#include "tests/transport/compliance.hpp"
#include "transport/limits.hpp"

namespace vmigrate::transport {
namespace {

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
  // Sends until there is no room anywhere between the two, but not so long that the peer counts as dead.
  size_t sent = 0;
  for (int blocked = 0; blocked < 50; ++blocked) {
    for (; session_->send(Channel::kDemand, message) == PostStatus::kPosted; blocked = 0)
      ASSERT_LT(++sent, 20'000u) << "never blocks";
    ::usleep(1000);
  }
  EXPECT_GE(sent, kMessagesQueuedMax);
  for (size_t i = 0; i < sent; ++i) ASSERT_EQ(receive_message(*endpoint), message) << i << " of " << sent;
  EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 4096)), OpResult::kOk);
}

TEST_P(TransportCompliance, AnOwnerWhoPollsNeedsNoEventsAndGetsThemBackBeforeItSleeps) {
  listen();
  TestMemory remote(65536), local(65536);
  remote.fill(4);
  const RemoteKey key = must_expose_memory(remote);
  const auto endpoint = must_connect();
  const LocalId id = endpoint->register_local(local.local()).value();
  for (int round = 0; round < 20; ++round) {
    const uint64_t at = static_cast<uint64_t>(round % 8) * 4096;
    std::vector<Completion> seen(1);
    endpoint->set_polled(true);
    const Operation polled = make_operation(1, id, at, key, at, 4096);
    ASSERT_TRUE(eventually([&] { return endpoint->read({&polled, 1}).posted == 1; }));
    ASSERT_TRUE(eventually([&] { return endpoint->poll(seen) == 1; }));
    EXPECT_EQ(seen[0].result, OpResult::kOk);
    // The operation is posted while the owner polls. It completes while the owner sleeps, or in every other
    // round before that.
    const Operation later = make_operation(2, id, at + 32768, key, at + 32768, 4096);
    ASSERT_TRUE(eventually([&] { return endpoint->read({&later, 1}).posted == 1; }));
    if (round % 2 == 1) ::usleep(2000);
    endpoint->set_polled(false);
    size_t count = 0;
    while (count == 0) {
      ASSERT_TRUE(wait_ready(*endpoint, kPatience));
      count = endpoint->poll(seen);
    }
    EXPECT_EQ(seen[0].tag, 2u);
    EXPECT_EQ(seen[0].result, OpResult::kOk);
  }
  EXPECT_EQ(std::memcmp(remote.base(), local.base(), 65536), 0);
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
      ASSERT_EQ(::epoll_wait(outer.get(), &event, 1, 20'000), 1) << "round " << round;
      Completion completion;
      done = endpoint->poll(std::span(&completion, 1));
    }
  }
  Completion completion;
  EXPECT_EQ(endpoint->poll(std::span(&completion, 1)), 0u);
  EXPECT_EQ(::epoll_wait(outer.get(), &event, 1, 20), 0) << "ready with nothing to tell";
}

}  // namespace
}  // namespace vmigrate::transport
