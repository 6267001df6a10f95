// Tests what must be refused and how it is reported: invalid memory, keys, credentials and files.

#include <sys/mount.h>
#include <sys/stat.h>

#include "tests/transport/compliance.hpp"

namespace vmigrate::transport {
namespace {

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

TEST_P(TransportCompliance, ExposesOnlyWhatCanBeServed) {
  listen();
  std::vector<std::byte> plain(4096);
  const auto without_file = session_->expose(LocalMemory{plain.data(), -1, 0, plain.size()}, Access::kRead);
  if (provider().shares_files)
    EXPECT_EQ(without_file.error().code, ErrorCode::kUnsupported);
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
    if (provider().pins_memory) {
      // Pinning takes all pages at once, so the error shows early.
      EXPECT_EQ(endpoint->register_local(local.local()).error().code, ErrorCode::kNoSpace);
      EXPECT_EQ(::umount2(directory, MNT_DETACH), 0);
      ::rmdir(directory);
      return;
    }
    const LocalId id = endpoint->register_local(local.local()).value();
    EXPECT_EQ(run_one(*endpoint, make_operation(1, id, 0, key, 0, 512 << 10)), OpResult::kOk);
    EXPECT_EQ(run_one(*endpoint, make_operation(2, id, 1 << 20, key, 1 << 20, 1 << 20)), OpResult::kNoSpace);
    // Pages that were already allocated are not affected, and the connection continues.
    EXPECT_EQ(run_one(*endpoint, make_operation(3, id, 0, key, 0, 4096)), OpResult::kOk);
    EXPECT_EQ(std::memcmp(remote.base(), local.base(), 512 << 10), 0);
  }
  EXPECT_EQ(::umount2(directory, MNT_DETACH), 0);
  ::rmdir(directory);
}

TEST_P(TransportCompliance, AFileThatShrinksIsAnIoErrorOnEitherSide) {
  if (provider().pins_memory) {
    // The device still holds the pages that the file has released: no error, and no signal either.
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

}  // namespace
}  // namespace vmigrate::transport
