// Tests the listener against a peer that lies. The honest peer is in tests/preload.

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "tests/preload/preload_fixture.hpp"
#include "vm/mapping.hpp"

namespace vmigrate::test {
namespace {

using pager::VmState;

class Liar {
 public:
  explicit Liar(const std::string& path) {
    socket_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::connect(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    timeval limit{30, 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    hello.magic = wire::kPreloadMagic;
    hello.version = wire::kPreloadVersion;
    hello.op = static_cast<uint16_t>(wire::PreloadOp::kHello);
    hello.pid = 1;  // not believed
    hello.descriptor_count = 1;
    hello.kinds[0] = static_cast<uint8_t>(wire::PreloadDescriptor::kSync);
  }

  static UniqueFd userfaultfd() {
    UniqueFd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    uffdio_api api{};
    api.api = UFFD_API;
    EXPECT_EQ(::ioctl(fd.get(), UFFDIO_API, &api), 0);
    return fd;
  }

  template <typename Message>
  void send(const Message& message, const std::vector<int>& descriptors = {}) {
    send_bytes(&message, sizeof message, descriptors);
  }

  void send_bytes(const void* bytes, size_t length, const std::vector<int>& descriptors = {}) {
    iovec body{const_cast<void*>(bytes), length};
    alignas(cmsghdr) char control[CMSG_SPACE(32 * sizeof(int))] = {};
    msghdr record{};
    record.msg_iov = &body;
    record.msg_iovlen = 1;
    const size_t fd_bytes = descriptors.size() * sizeof(int);
    if (fd_bytes > 0) {
      record.msg_control = control;
      record.msg_controllen = CMSG_SPACE(fd_bytes);
      cmsghdr* rights = CMSG_FIRSTHDR(&record);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(fd_bytes);
      std::memcpy(CMSG_DATA(rights), descriptors.data(), fd_bytes);
    }
    EXPECT_EQ(::sendmsg(socket_.get(), &record, MSG_NOSIGNAL), static_cast<ssize_t>(length));
  }

  /// PRELOAD_STATUS of the answer; 0 at the end of file, -1 if nothing comes.
  int answer() {
    wire::PreloadAck ack{};
    const ssize_t length = ::recv(socket_.get(), &ack, sizeof ack, 0);
    return length == sizeof ack ? ack.status : length == 0 ? 0 : -1;
  }

  wire::PreloadHello hello{};

 private:
  UniqueFd socket_;
};

constexpr int kOk = static_cast<int>(wire::PreloadStatus::kOk);
constexpr int kRefused = static_cast<int>(wire::PreloadStatus::kRefused);

using PreloadListenerTest = PreloadTest;

TEST_F(PreloadListenerTest, ABadHelloIsRefused) {
  const auto ram = region("ram", kMiB);
  const UniqueFd good = Liar::userfaultfd();
  const UniqueFd file(::open(ram.path.c_str(), O_RDWR | O_CLOEXEC));
  const std::vector<std::function<void(Liar&)>> lies = {
      [&](Liar& liar) { liar.hello.magic++, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { liar.hello.version++, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { liar.hello.op = 2, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { liar.send(liar.hello); },
      [&](Liar& liar) { liar.send(liar.hello, {file.get()}); },
      [&](Liar& liar) {
        liar.send(liar.hello, {good.get(), good.get()});
      },
      [&](Liar& liar) { liar.hello.descriptor_count = 0xffffffff, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { liar.hello.descriptor_count = 0, liar.send(liar.hello); },
      [&](Liar& liar) { liar.hello.kinds[0] = 2, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { liar.hello.kinds[0] = 77, liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) { std::memset(liar.hello.numbers, 0xff, 64), liar.send(liar.hello, {good.get()}); },
      [&](Liar& liar) {
        liar.hello.descriptor_count = 20;
        liar.send(liar.hello, std::vector<int>(20, good.get()));
      },
      [&](Liar& liar) { liar.send_bytes(&liar.hello, 95, {good.get()}); },
      [&](Liar& liar) {
        const char big[4096] = {};
        liar.send_bytes(big, sizeof big, {good.get()});
      },
      [&](Liar& liar) { liar.send(wire::PreloadRegion{}); },
  };
  for (size_t i = 0; i < lies.size(); i++) {
    auto listener = listen({ram});
    Liar liar(path("socket"));
    lies[i](liar);
    EXPECT_EQ(liar.answer(), kRefused) << "lie " << i;
    EXPECT_EQ(liar.answer(), 0) << "lie " << i;
    EXPECT_EQ(listener->snapshot().state, VmState::kRefused) << "lie " << i;
    EXPECT_EQ(listener->snapshot().failure->code, ErrorCode::kProtocol) << "lie " << i;
    EXPECT_TRUE(listener->snapshot().descriptors.empty());
  }
}

TEST_F(PreloadListenerTest, OnlyARegularFileOfThisUserIsARegion) {
  const auto ram = region("ram", kMiB);
  EXPECT_TRUE(pager::identify(ram).ok());
  auto link = ram;
  link.path = path("link");
  ASSERT_EQ(::symlink(ram.path.c_str(), link.path.c_str()), 0);
  auto found = pager::identify(link);
  ASSERT_FALSE(found.ok());
  EXPECT_EQ(found.error().code, ErrorCode::kRegionChanged);
  if (::geteuid() != 0) return;
  ASSERT_EQ(::chown(ram.path.c_str(), 65534, 65534), 0);
  found = pager::identify(ram);
  ASSERT_FALSE(found.ok());
  EXPECT_EQ(found.error().code, ErrorCode::kRegionChanged);
}

TEST_F(PreloadListenerTest, ABadRegionIsRefused) {
  const auto ram = region("ram", kMiB), other = region("other", kMiB);
  const UniqueFd file(::open(ram.path.c_str(), O_RDWR | O_CLOEXEC));
  struct stat status {};
  ASSERT_EQ(::fstat(file.get(), &status), 0);
  struct stat other_status {};
  ASSERT_EQ(::stat(other.path.c_str(), &other_status), 0);
  void* mapping = ::mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  ASSERT_NE(mapping, MAP_FAILED);
  wire::PreloadRegion truth{};
  truth.magic = wire::kPreloadMagic;
  truth.version = wire::kPreloadVersion;
  truth.op = static_cast<uint16_t>(wire::PreloadOp::kRegion);
  truth.device = status.st_dev;
  truth.inode = status.st_ino;
  truth.base = reinterpret_cast<uint64_t>(mapping);
  truth.length = kMiB;
  truth.map_flags = MAP_SHARED;
  using Lie = std::function<void(wire::PreloadRegion&)>;
  const std::vector<std::pair<Lie, ErrorCode>> lies = {
      {[](auto& m) { m.magic++; }, ErrorCode::kProtocol},
      {[](auto& m) { m.version++; }, ErrorCode::kProtocol},
      {[](auto& m) { m.op = 3; }, ErrorCode::kProtocol},
      {[](auto& m) { m.inode++; }, ErrorCode::kRegionChanged},
      {[](auto& m) { m.device++; }, ErrorCode::kRegionChanged},
      {[&](auto& m) { m.inode = other_status.st_ino; },
       ErrorCode::kRegionChanged},  // a region, but not mapped there
      {[](auto& m) { m.base += 4096; }, ErrorCode::kRegionChanged},
      {[](auto& m) { m.base++; }, ErrorCode::kProtocol},
      {[](auto& m) { m.base = 0; }, ErrorCode::kProtocol},
      {[](auto& m) { m.base = ~uint64_t{0} - 4095; }, ErrorCode::kProtocol},
      {[](auto& m) { m.length = 0; }, ErrorCode::kProtocol},
      {[](auto& m) { m.length = 2 * kMiB; }, ErrorCode::kProtocol},
      {[](auto& m) { m.length = ~uint64_t{0}; }, ErrorCode::kProtocol},
      {[](auto& m) { m.length--; }, ErrorCode::kProtocol},
      {[](auto& m) { m.file_offset = 4096; }, ErrorCode::kProtocol},
      {[](auto& m) { m.file_offset = ~uint64_t{0} - 4095; }, ErrorCode::kProtocol},
      {[](auto& m) { m.file_offset = 4096, m.length -= 4096; }, ErrorCode::kRegionChanged},
      {[](auto& m) { m.map_flags = MAP_PRIVATE; }, ErrorCode::kUnsupported},
      {[](auto& m) { m.map_flags = 0; }, ErrorCode::kUnsupported},
  };
  for (size_t i = 0; i < lies.size(); i++) {
    auto listener = listen({ram, other}, false);
    Liar liar(path("socket"));
    const UniqueFd descriptor = Liar::userfaultfd();
    liar.send(liar.hello, {descriptor.get()});
    ASSERT_EQ(liar.answer(), kOk);
    EXPECT_EQ(listener->snapshot().pid, ::getpid());
    wire::PreloadRegion message = truth;
    lies[i].first(message);
    liar.send(message);
    EXPECT_EQ(liar.answer(), kRefused) << "lie " << i;
    ASSERT_EQ(listener->snapshot().state, VmState::kRefused) << "lie " << i;
    EXPECT_EQ(listener->snapshot().failure->code, lies[i].second)
        << "lie " << i << ": " << listener->snapshot().failure->what;
  }
  auto listener = listen({ram, other}, false);
  Liar honest(path("socket"));
  const UniqueFd descriptor = Liar::userfaultfd();
  honest.send(honest.hello, {descriptor.get()});
  ASSERT_EQ(honest.answer(), kOk);
  honest.send(truth);
  EXPECT_EQ(honest.answer(), kOk);
  EXPECT_EQ(listener->snapshot().state, VmState::kAttached);
  ::munmap(mapping, kMiB);
}

TEST_F(PreloadListenerTest, ConnectionsThatSayNothingDoNotKeepTheVmOut) {
  const auto ram = region("ram", kMiB);
  auto listener = listen({ram});
  std::vector<std::unique_ptr<Liar>> silent;
  for (int i = 0; i < 20; i++) silent.push_back(std::make_unique<Liar>(path("socket")));
  auto vm = helper({ram});
  EXPECT_EQ(vm->ask(map_line(ram)), "mapped 0");
  EXPECT_EQ(listener->snapshot().state, VmState::kComplete);
}

TEST_F(PreloadListenerTest, TheSocketIsOursAloneAndAStaleOneIsReplaced) {
  const auto ram = region("ram", kMiB);
  {
    auto listener = listen({ram});
    struct stat status {};
    ASSERT_EQ(::stat(path("socket").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600u);
    const auto second = pager::PreloadListener::listen({path("socket"), {ram}, true}, nullptr);
    ASSERT_FALSE(second.ok());
    EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
  }
  struct stat status {};
  EXPECT_NE(::stat(path("socket").c_str(), &status), 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path("socket").c_str(), sizeof address.sun_path - 1);
  {
    UniqueFd dead(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  EXPECT_EQ(listen({ram})->snapshot().state, VmState::kWaiting);
}

TEST_F(PreloadListenerTest, ImpossibleRegionsAreRefusedAtOnce) {
  const auto code_of = [&](std::vector<pager::RegionFileConfig> regions) {
    auto result = pager::PreloadListener::listen({path("socket"), std::move(regions), true}, nullptr);
    return result.ok() ? ErrorCode{} : result.error().code;
  };
  EXPECT_EQ(code_of({}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"relative", kMiB, 4096}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a\nb", kMiB, 4096}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a", 0, 4096}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a", kMiB + 1, 4096}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a", kMiB, 0}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a", kMiB, 12288}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{"/a", ~uint64_t{0} - 4095, 4096}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(std::vector<pager::RegionFileConfig>(65, {"/a", kMiB, 4096})),
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace vmigrate::test
