// Tests tagged frames against somebody in the middle who flips, repeats, swaps, drops and cuts. Nothing that
// he has changed may take effect: no read completes, no byte is written, no message arrives.

#include <algorithm>
#include <deque>
#include <optional>

#include "tests/transport/hostile_fixture.hpp"
#include "tests/transport/relay.hpp"
#include "transport/frames.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kBytes = 1 << 20;
constexpr uint32_t kPage = 4096;

/// What a target can send, and so what can be changed.
enum class Kind : uint8_t { kRead = 1, kRefusedRead, kWrite, kMessageToSource, kMessageToTarget };

class Integrity : public testing::Test {
 protected:
  void SetUp() override {
    remote_.fill(1);
    pristine_.assign(remote_.base(), remote_.base() + kBytes);
    listener_ = must_listen(kTcpProvider);
    session_ = listener_
                   ->expose_session(
                       credentials_,
                       [](void* self, Channel, std::span<const std::byte>) {
                         ++static_cast<Integrity*>(self)->message_count_;
                       },
                       this)
                   .value();
    key_ = session_->expose(remote_.local(), Access::kReadWrite).value();
  }
  void TearDown() override { close(); }

  void open(Relay::Options options) {
    close();
    local_.fill(2);
    relay_ = std::make_unique<Relay>(listener_->address(), std::move(options));
    auto endpoint = connect(kTcpProvider, relay_->address(), credentials_);
    ASSERT_TRUE(endpoint.ok()) << endpoint.error().what;
    endpoint_ = std::move(endpoint).value();
    local_id_ = endpoint_->register_local(local_.local()).value();
  }
  void close() {
    endpoint_.reset();
    relay_.reset();
  }
  Operation page(uint64_t index, const RemoteKey& key) const {
    return Operation{index, local_id_, index * kPage, key, index * kPage, kPage};
  }
  std::vector<Operation> pages(uint64_t count) const {
    std::vector<Operation> all;
    for (uint64_t i = 0; i < count; ++i) all.push_back(page(i, key_));
    return all;
  }
  bool page_is_right(uint64_t index) const {
    return std::memcmp(local_.base() + index * kPage, pristine_.data() + index * kPage, kPage) == 0;
  }
  bool remote_is_unchanged() const { return std::memcmp(remote_.base(), pristine_.data(), kBytes) == 0; }
  // Reads pages. Those that complete are right, and the change in the middle is noticed.
  void expect_reads_end(uint64_t page_count) {
    const std::vector<Completion> completions = run_all(*endpoint_, pages(page_count));
    EXPECT_EQ(completions.size(), page_count);
    uint64_t lost_count = 0;
    for (const Completion& completion : completions) {
      if (completion.result == OpResult::kOk) {
        EXPECT_TRUE(page_is_right(completion.tag)) << "page " << completion.tag;
      } else {
        EXPECT_EQ(completion.result, OpResult::kDisconnected);
        ++lost_count;
      }
    }
    EXPECT_GT(lost_count, 0u);
    EXPECT_TRUE(wait_disconnected(*endpoint_));
  }
  void make_frame(Kind kind);
  void expect_flip_is_noticed(Kind kind, size_t byte, uint8_t bit);

  const Credentials credentials_ = make_credentials(1, Security::kIntegrity);
  TestMemory remote_{kBytes};
  TestMemory local_{kBytes};
  Bytes pristine_;
  std::atomic<uint64_t> message_count_{0};
  std::unique_ptr<Listener> listener_;
  std::unique_ptr<ExposedSession> session_;
  RemoteKey key_;
  std::unique_ptr<Relay> relay_;
  std::unique_ptr<Endpoint> endpoint_;
  LocalId local_id_{};
};

void Integrity::make_frame(Kind kind) {
  const Operation right = page(3, key_);
  RemoteKey unknown = key_;
  unknown.key ^= 1;
  const Operation refused = page(3, unknown);
  const Bytes message(100, std::byte{7});
  switch (kind) {
    case Kind::kRead:
      EXPECT_EQ(endpoint_->read(std::span(&right, 1)).posted, 1u);
      break;
    case Kind::kRefusedRead:
      EXPECT_EQ(endpoint_->read(std::span(&refused, 1)).posted, 1u);
      break;
    case Kind::kWrite:
      EXPECT_EQ(endpoint_->write(std::span(&right, 1)).posted, 1u);
      break;
    case Kind::kMessageToSource:
      EXPECT_EQ(endpoint_->send(message), PostStatus::kPosted);
      break;
    case Kind::kMessageToTarget:
      EXPECT_TRUE(
          eventually([&] { return session_->send(Channel::kDemand, message) == PostStatus::kPosted; }));
      break;
  }
}

void Integrity::expect_flip_is_noticed(Kind kind, size_t byte, uint8_t bit) {
  const bool is_to_source = kind == Kind::kWrite || kind == Kind::kMessageToSource;
  const Way way = is_to_source ? Way::kToSource : Way::kToTarget;
  open({.alter = [=](Way to, size_t, const Bytes& frame) {
    if (to != way) return std::vector<Bytes>{frame};
    Bytes spoiled = frame;
    spoiled.at(byte) ^= static_cast<std::byte>(1u << bit);
    // For those who now wait for more than the frame has.
    return std::vector<Bytes>{spoiled, Bytes(wire::kTransferBytesMax + 64)};
  }});
  make_frame(kind);
  Bytes message(wire::kMessageBytesMax);
  EXPECT_TRUE(eventually([&] {
    Completion completion;
    if (endpoint_->poll(std::span(&completion, 1)) == 1) {
      EXPECT_EQ(completion.result, OpResult::kDisconnected) << "byte " << byte << " bit " << int{bit};
    }
    EXPECT_EQ(endpoint_->receive(message), 0u) << "byte " << byte << " bit " << int{bit};
    return endpoint_->disconnected();
  })) << "byte "
      << byte << " bit " << int{bit};
  EXPECT_TRUE(remote_is_unchanged());
  EXPECT_EQ(message_count_.load(), 0u);
}

TEST_F(Integrity, ABitThatFlipsAnywhereEndsTheConnection) {
  constexpr size_t kHeader = wire::kFrameHeaderBytes;
  const struct {
    Kind kind;
    size_t body_bytes;
  } frames[] = {{Kind::kRead, kPage},
                {Kind::kRefusedRead, 0},
                {Kind::kWrite, kPage},
                {Kind::kMessageToSource, 100},
                {Kind::kMessageToTarget, 100}};
  for (const auto& frame : frames) {
    SCOPED_TRACE("kind " + std::to_string(static_cast<int>(frame.kind)));
    const size_t tag = kHeader + frame.body_bytes;
    for (size_t byte = 0; byte < tag + wire::kFrameTagBytes; ++byte) {
      const bool is_inside_body = byte > kHeader && byte + 1 < tag;
      if (is_inside_body && byte % 1013 != 0) continue;
      expect_flip_is_noticed(frame.kind, byte, byte % 8);
      if (HasFailure()) return;
    }
  }
  // A status that becomes another valid one.
  const size_t status_byte = offsetof(wire::FrameHeader, status);
  for (uint8_t bit = 0; bit < 8; ++bit) expect_flip_is_noticed(Kind::kRefusedRead, status_byte, bit);
}

TEST_F(Integrity, AChangedRequestReadsNothingElse) {
  for (size_t byte = 0; byte < wire::kFrameHeaderBytes + wire::kFrameTagBytes; ++byte) {
    open({.alter = [byte](Way way, size_t, const Bytes& frame) {
      Bytes spoiled = frame;
      if (way == Way::kToSource) spoiled.at(byte) ^= std::byte{0x10};
      return std::vector<Bytes>{spoiled};
    }});
    EXPECT_EQ(run_one(*endpoint_, page(3, key_)), OpResult::kDisconnected) << "byte " << byte;
    EXPECT_TRUE(relay_->recorded(Way::kToTarget).empty()) << "byte " << byte << " was answered";
  }
}

TEST_F(Integrity, RepeatedSwappedAndDroppedFramesEndTheConnection) {
  for (const Way way : {Way::kToSource, Way::kToTarget}) {
    SCOPED_TRACE(way == Way::kToSource ? "requests" : "replies");
    open({.alter = [way](Way to, size_t index, const Bytes& frame) {
      if (to == way && index == 2) return std::vector<Bytes>{frame, frame};
      return std::vector<Bytes>{frame};
    }});
    expect_reads_end(16);

    auto held = std::make_shared<Bytes>();
    open({.alter = [way, held](Way to, size_t index, const Bytes& frame) {
      if (to == way && index == 2) {
        *held = frame;
        return std::vector<Bytes>{};
      }
      if (to == way && index == 3) return std::vector<Bytes>{frame, *held};
      return std::vector<Bytes>{frame};
    }});
    expect_reads_end(16);

    open({.alter = [way](Way to, size_t index, const Bytes& frame) {
      if (to == way && index == 2) return std::vector<Bytes>{};
      return std::vector<Bytes>{frame};
    }});
    expect_reads_end(16);

    // An older frame instead of the one that is due.
    auto first = std::make_shared<Bytes>();
    open({.alter = [way, first](Way to, size_t index, const Bytes& frame) {
      if (to == way && index == 0) *first = frame;
      return std::vector<Bytes>{to == way && index == 5 ? *first : frame};
    }});
    expect_reads_end(16);
  }
}

TEST_F(Integrity, AFrameOfAnotherConnectionEndsTheConnection) {
  open({});
  EXPECT_EQ(run_one(*endpoint_, page(0, key_)), OpResult::kOk);
  const Bytes request = relay_->recorded(Way::kToSource).at(0);
  const Bytes reply = relay_->recorded(Way::kToTarget).at(0);
  ASSERT_TRUE(page_is_right(0));
  // The same request and the same reply, recorded a connection earlier.
  for (const Way way : {Way::kToSource, Way::kToTarget}) {
    const Bytes& old = way == Way::kToSource ? request : reply;
    open({.alter = [way, old](Way to, size_t, const Bytes& frame) {
      EXPECT_FALSE(std::equal(frame.end() - wire::kFrameTagBytes, frame.end(),
                              old.end() - wire::kFrameTagBytes, old.end()));
      return std::vector<Bytes>{to == way ? old : frame};
    }});
    EXPECT_EQ(run_one(*endpoint_, page(0, key_)), OpResult::kDisconnected);
  }
}

TEST_F(Integrity, AMessageIsNotGoodForTheOtherWay) {
  // The target's own first message comes back instead of the source's first.
  auto own = std::make_shared<Bytes>();
  open({.alter = [own](Way way, size_t, const Bytes& frame) {
    if (way == Way::kToSource) *own = frame;
    return std::vector<Bytes>{way == Way::kToSource ? frame : *own};
  }});
  make_frame(Kind::kMessageToSource);
  EXPECT_TRUE(eventually([&] { return message_count_.load() == 1; }));
  make_frame(Kind::kMessageToTarget);
  Bytes message(wire::kMessageBytesMax);
  EXPECT_TRUE(eventually([&] {
    EXPECT_EQ(endpoint_->receive(message), 0u);
    Completion completion;
    (void)endpoint_->poll(std::span(&completion, 1));
    return endpoint_->disconnected();
  }));
}

TEST_F(Integrity, AHelloCannotBeWeakened) {
  Credentials weak = credentials_;
  weak.security = Security::kNone;
  auto refused = connect(kTcpProvider, listener_->address(), weak);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kRefused);
  Credentials strong = credentials_;
  strong.security = Security::kEncrypt;
  EXPECT_TRUE(connect(kTcpProvider, listener_->address(), strong).ok());

  // A source that takes less, a target that wants tags, and somebody between them who would rather not.
  const Credentials open_source = make_credentials(9, Security::kNone);
  const auto session = listener_->expose_session(open_source, nullptr, nullptr).value();
  Credentials target = open_source;
  target.security = Security::kIntegrity;
  ASSERT_TRUE(connect(kTcpProvider, listener_->address(), target).ok());
  Relay relay(listener_->address(), {.alter_hello = [](Way way, Bytes& bytes) {
                const size_t at = offsetof(wire::Hello, security);
                if (way == Way::kToSource && bytes.size() > at)
                  bytes[at] = static_cast<std::byte>(Security::kNone);
              }});
  auto weakened = connect(kTcpProvider, relay.address(), target);
  ASSERT_FALSE(weakened.ok());
  EXPECT_EQ(weakened.error().code, ErrorCode::kRefused);
}

TEST_F(Integrity, CutsOfTheStreamChangeNothing) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    open({.cuts = true, .seed = seed});
    std::vector<Operation> operations;
    for (uint64_t offset = 0, tag = 0; offset < kBytes; ++tag) {
      const uint64_t bytes = std::min<uint64_t>(kBytes - offset, 1 + random() % 70'000);
      operations.push_back({tag, local_id_, offset, key_, offset, static_cast<uint32_t>(bytes)});
      offset += bytes;
    }
    const Bytes message(1 + random() % wire::kMessageBytesMax, std::byte{5});
    EXPECT_TRUE(send_message(*endpoint_, message));
    make_frame(Kind::kMessageToTarget);
    for (const Completion& completion : run_all(*endpoint_, operations))
      EXPECT_EQ(completion.result, OpResult::kOk);
    EXPECT_EQ(std::memcmp(local_.base(), pristine_.data(), kBytes), 0);
    EXPECT_EQ(receive_message(*endpoint_).size(), 100u);
    EXPECT_TRUE(eventually([&] { return message_count_.load() == seed; }));
    for (const Completion& completion : run_all(*endpoint_, operations, true))
      EXPECT_EQ(completion.result, OpResult::kOk);
    EXPECT_TRUE(remote_is_unchanged());
  }
}

TEST_F(Integrity, WhateverIsChangedNoWrongPageCompletes) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    auto random = std::make_shared<std::mt19937_64>(seed);
    const Way way = seed % 2 == 0 ? Way::kToSource : Way::kToTarget;
    const size_t spoiled_index = (*random)() % 20;
    Relay::Options options{.cuts = true, .seed = seed};
    options.alter = [=](Way to, size_t index, const Bytes& frame) {
      Bytes changed = frame;
      if (to == way && index == spoiled_index) {
        const size_t at = (*random)() % changed.size();
        changed[at] ^= static_cast<std::byte>(1 + (*random)() % 255);
        // Cut short, or longer than it was.
        if ((*random)() % 4 == 0) changed.resize((*random)() % (2 * changed.size()));
      }
      return std::vector<Bytes>{changed};
    };
    open(std::move(options));
    expect_reads_end(64);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace vmigrate::transport
