// Measures how a page gets from a stream or a neighbour's file into a fresh page of a tmpfs file. The choices
// in memory_access.hpp, shm/region.cpp and tcp/serve.cpp are based on these figures. Compare rows of one run
// only; figures of different machines are not comparable.

#include <arpa/inet.h>
#include <benchmark/benchmark.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/check.hpp"
#include "base/unique_fd.hpp"
#include "transport/shm/provider.hpp"
#include "transport/tcp/provider.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kFileBytes = 64 << 20;

struct File {
  UniqueFd fd;
  std::byte* base;

  File() : fd(::memfd_create("bench", MFD_CLOEXEC)) {
    VMG_CHECK(::ftruncate(fd.get(), kFileBytes) == 0);
    base =
        static_cast<std::byte*>(::mmap(nullptr, kFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0));
    VMG_CHECK(base != MAP_FAILED);
  }
  ~File() { ::munmap(base, kFileBytes); }
  void fill() { std::memset(base, 0x5a, kFileBytes); }
  // Frees the pages so that they fault again, as in a region that has just been created.
  void forget() { VMG_CHECK(::ftruncate(fd.get(), 0) == 0 && ::ftruncate(fd.get(), kFileBytes) == 0); }
};

/// Calls `move(offset)` over the whole file, with fresh target pages for each pass.
template <typename Move>
void over_fresh_pages(benchmark::State& state, File& target, uint64_t bytes, Move move) {
  uint64_t at = 0;
  for (auto _ : state) {
    move(at);
    at += bytes;
    if (at + bytes > kFileBytes) {
      state.PauseTiming();
      target.forget();
      at = 0;
      state.ResumeTiming();
    }
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * bytes));
}

enum class Copy { kPwriteFromMapping, kPreadIntoMapping, kBounce, kMemcpy };

void copy_between_files(benchmark::State& state, Copy copy) {
  File remote, local;
  remote.fill();
  const auto bytes = static_cast<uint64_t>(state.range(0));
  std::vector<std::byte> bounce(64 << 10);
  over_fresh_pages(state, local, bytes, [&](uint64_t at) {
    const auto offset = static_cast<off_t>(at);
    switch (copy) {
      case Copy::kPwriteFromMapping:
        VMG_CHECK(::pwrite(local.fd.get(), remote.base + at, bytes, offset) == static_cast<ssize_t>(bytes));
        break;
      case Copy::kPreadIntoMapping:
        VMG_CHECK(::pread(remote.fd.get(), local.base + at, bytes, offset) == static_cast<ssize_t>(bytes));
        break;
      case Copy::kBounce:
        for (uint64_t done = 0; done < bytes; done += bounce.size()) {
          const size_t part = std::min<uint64_t>(bounce.size(), bytes - done);
          const auto position = static_cast<off_t>(at + done);
          VMG_CHECK(::pread(remote.fd.get(), bounce.data(), part, position) == static_cast<ssize_t>(part));
          VMG_CHECK(::pwrite(local.fd.get(), bounce.data(), part, position) == static_cast<ssize_t>(part));
        }
        break;
      case Copy::kMemcpy:
        std::memcpy(local.base + at, remote.base + at, bytes);
        break;
    }
  });
}
BENCHMARK_CAPTURE(copy_between_files, pwrite_from_mapping, Copy::kPwriteFromMapping)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(copy_between_files, pread_into_mapping, Copy::kPreadIntoMapping)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(copy_between_files, bounce_64k, Copy::kBounce)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(copy_between_files, memcpy, Copy::kMemcpy)->Arg(4096)->Arg(1 << 20);

/// Two ends of a loopback tcp connection.
struct Pair {
  UniqueFd left, right;
  Pair() {
    const UniqueFd listening(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* raw = reinterpret_cast<sockaddr*>(&address);
    VMG_CHECK(::bind(listening.get(), raw, length) == 0 && ::listen(listening.get(), 1) == 0);
    VMG_CHECK(::getsockname(listening.get(), raw, &length) == 0);
    left.reset(::socket(AF_INET, SOCK_STREAM, 0));
    VMG_CHECK(::connect(left.get(), raw, length) == 0);
    right.reset(::accept(listening.get(), nullptr, nullptr));
    const int one = 1;
    for (const int fd : {left.get(), right.get()})
      VMG_CHECK(::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0);
  }
};

enum class Landing { kMapping, kBounce64k, kBounce256k };

/// A raw sender streams a file. The variants differ only in how the bytes are stored.
void land_from_tcp(benchmark::State& state, Landing landing, bool by_sendfile) {
  File remote, local;
  remote.fill();
  const auto bytes = static_cast<uint64_t>(state.range(0));
  Pair pair;
  std::thread sender([&] {
    std::vector<std::byte> buffer(bytes);
    for (uint64_t at = 0;; at = at + 2 * bytes <= kFileBytes ? at + bytes : 0) {
      if (by_sendfile) {
        auto offset = static_cast<off_t>(at);
        for (uint64_t left = bytes; left > 0;) {
          const ssize_t count = ::sendfile(pair.right.get(), remote.fd.get(), &offset, left);
          if (count <= 0) return;
          left -= static_cast<uint64_t>(count);
        }
      } else {
        VMG_CHECK(::pread(remote.fd.get(), buffer.data(), bytes, static_cast<off_t>(at)) ==
                  static_cast<ssize_t>(bytes));
        for (uint64_t done = 0; done < bytes;) {
          const ssize_t count = ::send(pair.right.get(), buffer.data() + done, bytes - done, MSG_NOSIGNAL);
          if (count <= 0) return;
          done += static_cast<uint64_t>(count);
        }
      }
    }
  });
  std::vector<std::byte> bounce(landing == Landing::kBounce256k ? 256 << 10 : 64 << 10);
  over_fresh_pages(state, local, bytes, [&](uint64_t at) {
    for (uint64_t done = 0; done < bytes;) {
      const uint64_t left = bytes - done;
      const bool mapped = landing == Landing::kMapping;
      std::byte* const to = mapped ? local.base + at + done : bounce.data();
      const ssize_t count =
          ::recv(pair.left.get(), to, mapped ? left : std::min<uint64_t>(left, bounce.size()), MSG_WAITALL);
      VMG_CHECK(count > 0);
      if (!mapped) {
        VMG_CHECK(::pwrite(local.fd.get(), bounce.data(), static_cast<size_t>(count),
                           static_cast<off_t>(at + done)) == count);
      }
      done += static_cast<uint64_t>(count);
    }
  });
  // The sender must not get SIGPIPE from sendfile: a reset of its own end stops it.
  ::shutdown(pair.left.get(), SHUT_RD);
  ::signal(SIGPIPE, SIG_IGN);
  pair.left.reset();
  sender.join();
}
BENCHMARK_CAPTURE(land_from_tcp, mapping_sendfile, Landing::kMapping, true)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(land_from_tcp, mapping_pread, Landing::kMapping, false)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(land_from_tcp, bounce_64k_sendfile, Landing::kBounce64k, true)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(land_from_tcp, bounce_64k_pread, Landing::kBounce64k, false)->Arg(4096)->Arg(1 << 20);
BENCHMARK_CAPTURE(land_from_tcp, bounce_256k_pread, Landing::kBounce256k, false)->Arg(4096)->Arg(1 << 20);

/// The complete transport: READs over a real session, `range(1)` outstanding at once.
void read_over(benchmark::State& state, bool tcp, Channel channel) {
  const Provider& provider = tcp ? kTcpProvider : kShmProvider;
  const Credentials credentials{{1}, {2}};
  const Address address =
      tcp ? Address{"127.0.0.1", 0} : Address{"/tmp/vmigrate-bench-" + std::to_string(::getpid()), 0};
  auto listener = provider.listen(address, {}).value();
  auto session = listener->expose_session(credentials, nullptr, nullptr).value();
  File remote, local;
  remote.fill();
  const RemoteKey key =
      session->expose(LocalMemory{remote.base, remote.fd.get(), 0, kFileBytes}, Access::kRead).value();
  constexpr std::chrono::seconds kTimeout{2};
  auto endpoint = provider.connect(listener->address(), credentials, channel, kTimeout, {}).value();
  const LocalId id = endpoint->register_local(LocalMemory{local.base, local.fd.get(), 0, kFileBytes}).value();
  const auto bytes = static_cast<uint32_t>(state.range(0));
  const auto depth = static_cast<uint64_t>(state.range(1));
  uint64_t posted = 0, completed = 0;
  over_fresh_pages(state, local, bytes * depth, [&](uint64_t at) {
    for (uint64_t i = 0; i < depth; ++i) {
      const Operation operation{posted, id, at + i * bytes, key, at + i * bytes, bytes};
      posted += endpoint->read(std::span(&operation, 1)).posted;
    }
    while (completed < posted) {
      Completion completions[wire::kOutstandingOpsMax];
      const size_t count = endpoint->poll(completions);
      for (size_t i = 0; i < count; ++i) VMG_CHECK(completions[i].result == OpResult::kOk);
      completed += count;
      if (count == 0) {
        pollfd ready{endpoint->event_fd(), POLLIN, 0};
        (void)::poll(&ready, 1, -1);
      }
    }
  });
  state.counters["source_cpu_us"] = benchmark::Counter(static_cast<double>(session->counters().cpu_ns) / 1e3,
                                                       benchmark::Counter::kAvgIterations);
}
BENCHMARK_CAPTURE(read_over, tcp_demand, true, Channel::kDemand)->Args({4096, 1})->UseRealTime();
BENCHMARK_CAPTURE(read_over, tcp_bulk, true, Channel::kBulk)
    ->Args({4096, 1})
    ->Args({4096, 16})
    ->UseRealTime();
BENCHMARK_CAPTURE(read_over, tcp_bulk, true, Channel::kBulk)->Args({1 << 20, 4})->UseRealTime();
BENCHMARK_CAPTURE(read_over, shm_demand, false, Channel::kDemand)->Args({4096, 1})->UseRealTime();
BENCHMARK_CAPTURE(read_over, shm_bulk, false, Channel::kBulk)->Args({1 << 20, 4})->UseRealTime();

}  // namespace
}  // namespace vmigrate::transport

BENCHMARK_MAIN();
