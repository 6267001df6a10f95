// The agent's end of the preload's socket: records and descriptors of a process that may send anything. It
// runs as the same user, as QEMU does, and has a userfaultfd and mappings of the region.

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/one_file.hpp"
#include "vm/preload_listener.hpp"

namespace vmigrate {
namespace {

using namespace pager;

constexpr uint64_t kRegionBytes = 64 << 10;

enum Flags : uint8_t { kRightFile = 1, kRightPlace = 2 };
/// An input is a row of these, each with its record behind it.
struct Sent {
  uint8_t flags;
  uint8_t descriptors;  ///< two bits each: none, or an entry of Process::descriptors
  uint8_t length_bytes;
} __attribute__((packed));

/// What QEMU would have.
struct Process {
  Process() {
    const std::vector<std::byte> bytes(kRegionBytes, std::byte{1});
    file.write(wire::PresenceHeader{}, 0, bytes);
    const UniqueFd fd(::open(file.path().c_str(), O_RDWR | O_CLOEXEC));
    VMG_CHECK(::fstat(fd.get(), &info) == 0);
    mapping = ::mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    VMG_CHECK(mapping != MAP_FAILED);
    descriptors[1] = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    VMG_CHECK(descriptors[1] >= 0);
    uffdio_api api{.api = UFFD_API, .features = 0, .ioctls = 0};
    VMG_CHECK(::ioctl(descriptors[1], UFFDIO_API, &api) == 0);
    descriptors[2] = ::dup(descriptors[1]);
    descriptors[3] = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    regions = {{file.path(), kRegionBytes, 4096, false}};
    socket_path = file.path() + ".sock";
  }
  fuzz::OneFile file;
  struct stat info {};
  void* mapping = nullptr;
  std::array<int, 4> descriptors{};
  std::vector<RegionFileConfig> regions;
  std::string socket_path;
};

UniqueFd connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size());
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  VMG_CHECK(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

void send_record(int socket, const Process& process, const Sent& sent, std::span<const std::byte> record) {
  std::array<int, fuzz::kDescriptorsMax> fds{};
  size_t count = 0;
  for (uint8_t bits = sent.descriptors; bits != 0; bits >>= 2)
    if ((bits & 3) != 0) fds[count++] = process.descriptors[bits & 3];
  (void)fuzz::send_with(socket, record, std::span(fds).first(count));
}

std::vector<std::byte> record_of(const Process& process, const Sent& sent, fuzz::Input& input) {
  const auto part = input.bytes(sent.length_bytes);
  std::vector<std::byte> record(part.begin(), part.end());
  if (record.size() != sizeof(wire::PreloadRegion)) return record;
  wire::PreloadRegion region;
  std::memcpy(&region, record.data(), sizeof region);
  if ((sent.flags & kRightFile) != 0) {
    region.device = process.info.st_dev;
    region.inode = process.info.st_ino;
  }
  if ((sent.flags & kRightPlace) != 0)
    region.base = reinterpret_cast<uintptr_t>(process.mapping) + region.file_offset;
  std::memcpy(record.data(), &region, sizeof region);
  return record;
}

void check(const PreloadListener& listener, const Process& process) {
  const VmSnapshot snapshot = listener.snapshot();
  VMG_CHECK((listener.memory() != nullptr) == (snapshot.state == VmState::kComplete));
  VMG_CHECK(snapshot.failure.has_value() == (snapshot.state == VmState::kRefused));
  const bool is_known = snapshot.state == VmState::kAttached || snapshot.state == VmState::kComplete;
  VMG_CHECK(is_known || snapshot.ranges.empty() || snapshot.state == VmState::kGone);
  if (is_known) VMG_CHECK(!snapshot.descriptors.empty() && snapshot.pid == ::getpid());
  uint64_t covered_bytes = 0;
  for (const MappedRange& range : snapshot.ranges) {
    VMG_CHECK(range.region_index == 0 && range.descriptor_index < snapshot.descriptors.size());
    VMG_CHECK(range.length_bytes <= kRegionBytes &&
              range.region_offset_bytes <= kRegionBytes - range.length_bytes);
    VMG_CHECK(raw(range.base) == reinterpret_cast<uintptr_t>(process.mapping) + range.region_offset_bytes);
    covered_bytes += range.length_bytes;
  }
  VMG_CHECK((covered_bytes == kRegionBytes) == (snapshot.state == VmState::kComplete) ||
            snapshot.state == VmState::kGone);
}

wire::PreloadHello hello_of(uint32_t count) {
  wire::PreloadHello hello{};
  hello.magic = wire::kPreloadMagic;
  hello.version = wire::kPreloadVersion;
  hello.op = static_cast<uint16_t>(wire::PreloadOp::kHello);
  hello.pid = 1;
  hello.descriptor_count = count;
  for (uint32_t i = 0; i < count; ++i) {
    hello.kinds[i] = 1;
    hello.numbers[4 * i] = static_cast<uint8_t>(10 + i);
  }
  return hello;
}

wire::PreloadRegion region_of(uint64_t offset, uint64_t length, uint64_t flags = MAP_SHARED) {
  return {wire::kPreloadMagic,
          wire::kPreloadVersion,
          static_cast<uint16_t>(wire::PreloadOp::kRegion),
          0,
          0,
          0,
          length,
          offset,
          flags};
}

}  // namespace

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  constexpr Sent kHello{0, 1, sizeof(wire::PreloadHello)}, kTwo{0, 9, sizeof(wire::PreloadHello)};
  constexpr Sent kRegion{3, 0, sizeof(wire::PreloadRegion)}, kStranger{0, 0, sizeof(wire::PreloadRegion)};
  all.push_back(Seed().add(kHello).add(hello_of(1)).add(kRegion).add(region_of(0, kRegionBytes)));
  all.push_back(Seed()
                    .add(kTwo)
                    .add(hello_of(2))
                    .add(kRegion)
                    .add(region_of(4096, kRegionBytes - 4096))
                    .add(kRegion)
                    .add(region_of(0, 4096)));
  all.push_back(Seed()
                    .add(kHello)
                    .add(hello_of(1))
                    .add(kRegion)
                    .add(region_of(0, 8192))
                    .add(kRegion)
                    .add(region_of(4096, 8192)));
  all.push_back(Seed().add(kHello).add(hello_of(1)).add(kStranger).add(region_of(0, kRegionBytes)));
  all.push_back(
      Seed().add(kHello).add(hello_of(1)).add(kRegion).add(region_of(0, kRegionBytes, MAP_PRIVATE)));
  all.push_back(Seed().add(kHello).add(hello_of(2)));
  all.push_back(Seed().add(kTwo).add(hello_of(1)));
  all.push_back(Seed().add(Sent{0, 3, sizeof(wire::PreloadHello)}).add(hello_of(1)));
  all.push_back(Seed().add(kRegion).add(region_of(0, kRegionBytes)));
  all.push_back(Seed().add(Sent{0, 0, 200}).fill(200, 1));
  return all;
}

}  // namespace vmigrate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using namespace vmigrate;
  static const Process its_process;
  const Process* const process = &its_process;
  static const auto loop = EventLoop::shared().value();  // kept: a thread for each input costs more
  fuzz::Input input(bytes, length_bytes);
  const auto listener =
      PreloadListener::listen({process->socket_path, process->regions, false}, nullptr).value();
  const UniqueFd socket = connect_to(process->socket_path);
  for (int i = 0; i < 6 && !input.empty(); ++i) {
    const auto sent = input.take<Sent>();
    const auto record = record_of(*process, sent, input);
    // A record of no bytes would be the end of the connection.
    if (record.empty()) continue;
    const VmSnapshot before = listener->snapshot();
    send_record(socket.get(), *process, sent, record);
    wire::PreloadAck ack{};
    const ssize_t count = fuzz::receive(socket.get(), std::as_writable_bytes(std::span(&ack, 1)), MSG_TRUNC);
    // A connection that was refused before is closed.
    if (count <= 0) break;
    VMG_CHECK(count == sizeof ack && ack.magic == wire::kPreloadMagic &&
              ack.op == static_cast<uint16_t>(wire::PreloadOp::kAck));
    check(*listener, *process);
    const VmSnapshot after = listener->snapshot();
    const bool is_taken = ack.status == static_cast<uint16_t>(wire::PreloadStatus::kOk);
    VMG_CHECK(is_taken || ack.status == static_cast<uint16_t>(wire::PreloadStatus::kRefused));
    if (!is_taken && before.state == VmState::kComplete)
      VMG_CHECK(after.state == VmState::kComplete && after.ranges.size() == before.ranges.size());
  }
  return 0;
}
