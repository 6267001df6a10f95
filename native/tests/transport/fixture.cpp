#include "tests/transport/fixture.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <map>
#include <sstream>

#include "base/check.hpp"
#include "tests/transport/unix_provider.hpp"

namespace vmigrate::transport {
namespace {

// As in the daemon: Node ignores it.
[[maybe_unused]] const auto kFormerHandler = std::signal(SIGPIPE, SIG_IGN);

}  // namespace

TestMemory::TestMemory(uint64_t length_bytes, const std::string& path, unsigned memfd_flags)
    : length_bytes_(length_bytes) {
  fd_.reset(path.empty() ? ::memfd_create("transport-test", MFD_CLOEXEC | memfd_flags)
                         : ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  VMG_CHECK(fd_.valid() && ::ftruncate(fd_.get(), static_cast<off_t>(length_bytes)) == 0);
  void* mapping = ::mmap(nullptr, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  VMG_CHECK(mapping != MAP_FAILED);
  base_ = static_cast<std::byte*>(mapping);
}

TestMemory::~TestMemory() {
  ::munmap(base_, length_bytes_);
}

void TestMemory::fill(uint64_t seed) {
  for (uint64_t i = 0; i + 8 <= length_bytes_; i += 8) {
    const uint64_t word = (i + seed) * 0x9e3779b97f4a7c15ull;
    std::memcpy(base_ + i, &word, sizeof word);
  }
}

Credentials make_credentials(uint8_t seed, Security security) {
  Credentials credentials;
  credentials.security = security;
  for (size_t i = 0; i < credentials.session.size(); ++i)
    credentials.session[i] = static_cast<uint8_t>(seed + i);
  for (size_t i = 0; i < credentials.token.size(); ++i)
    credentials.token[i] = static_cast<uint8_t>(seed * 3 + i);
  return credentials;
}

namespace {

struct DeviceAddresses {
  std::string missing;  ///< why there is no address
  std::vector<std::string> addresses;
};

/// This machine's addresses of a provider with devices: the first listens, the last connects. A child process
/// finds them, because a process that has opened an RDMA device cannot use it after a fork, and a test forks.
DeviceAddresses find_addresses(const Provider& provider) {
  int pipes[2];
  VMG_CHECK(::pipe2(pipes, O_CLOEXEC) == 0);
  const pid_t child = ::fork();
  VMG_CHECK(child >= 0);
  if (child == 0) {
    const auto found = provider.devices();
    std::string text;
    if (found.ok())
      for (const Device& device : found.value())
        for (const DevicePort& port : device.ports)
          for (const std::string& address : port.addresses) text += address + "\n";
    if (text.empty()) {
      text = "!needs rdma: ";
      text += found.ok() ? "no address here belongs to an active RDMA port" : found.error().what;
    }
    ::_exit(::write(pipes[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  ::close(pipes[1]);
  std::string text;
  char buffer[256];
  for (ssize_t count = 0; (count = ::read(pipes[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(count));
  ::close(pipes[0]);
  VMG_CHECK(::waitpid(child, nullptr, 0) == child);
  if (text.starts_with('!')) return {text.substr(1), {}};
  DeviceAddresses result;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) result.addresses.push_back(line);
  return result;
}

const DeviceAddresses& addresses_of(const Provider& provider) {
  static std::map<const Provider*, DeviceAddresses> known;
  const auto found = known.find(&provider);
  return found != known.end() ? found->second
                              : known.emplace(&provider, find_addresses(provider)).first->second;
}

}  // namespace

std::span<const Provider* const> tested_providers() {
  static const auto tested = [] {
    std::vector<const Provider*> all(providers().begin(), providers().end());
    all.push_back(&kUnixProvider);
    return all;
  }();
  return tested;
}

std::string missing_for(const Provider& provider) {
  return provider.devices == nullptr ? std::string() : addresses_of(provider).missing;
}

Address listen_address(const Provider& provider) {
  static std::atomic<int> number{0};
  if (provider.devices != nullptr) return Address{addresses_of(provider).addresses.front(), 0};
  if (!provider.host_is_path) return Address{"127.0.0.1", 0};
  return Address{"/tmp/vmigrate-data-" + std::to_string(::getpid()) + "-" + std::to_string(number++), 0};
}

Result<std::unique_ptr<Listener>> listen_at(const Provider& provider, const Address& address) {
  return provider.listen(address, {});
}

std::unique_ptr<Listener> must_listen(const Provider& provider) {
  auto listener = listen_at(provider, listen_address(provider));
  VMG_CHECK(listener.ok());
  return std::move(listener).value();
}

Result<std::unique_ptr<Endpoint>> connect(const Provider& provider, const Address& address,
                                          const Credentials& credentials, Channel channel) {
  Options options;
  if (provider.devices != nullptr) options["localAddress"] = addresses_of(provider).addresses.back();
  return provider.connect(address, credentials, channel, kConnectTimeout, options);
}

bool wait_ready(const Endpoint& endpoint, std::chrono::milliseconds timeout) {
  pollfd entry{endpoint.event_fd(), POLLIN, 0};
  return ::poll(&entry, 1, static_cast<int>(timeout.count())) == 1;
}

std::vector<Completion> run_all(Endpoint& endpoint, std::span<const Operation> operations, bool write) {
  std::vector<Completion> completions;
  size_t posted = 0;
  while (completions.size() < operations.size()) {
    if (posted < operations.size()) {
      const auto rest = operations.subspan(posted);
      const PostResult result = write ? endpoint.write(rest) : endpoint.read(rest);
      EXPECT_LE(result.posted, rest.size());
      posted += result.posted;
      if (result.status == PostStatus::kPosted) {
        EXPECT_EQ(posted, operations.size());
      }
    }
    Completion batch[16];
    const size_t count = endpoint.poll(batch);
    completions.insert(completions.end(), batch, batch + count);
    if (endpoint.disconnected() && completions.size() == posted) break;
    if (count == 0 && !wait_ready(endpoint, kPatience)) {
      ADD_FAILURE() << "event_fd never became readable, " << completions.size() << " of " << posted
                    << " posted operations completed";
      break;
    }
  }
  return completions;
}

OpResult run_one(Endpoint& endpoint, const Operation& operation, bool write) {
  const auto completions = run_all(endpoint, std::span(&operation, 1), write);
  if (completions.empty()) return OpResult::kDisconnected;
  EXPECT_EQ(completions[0].tag, operation.tag);
  return completions[0].result;
}

bool wait_disconnected(Endpoint& endpoint) {
  return eventually([&] {
    Completion batch[8];
    (void)endpoint.poll(batch);
    return endpoint.disconnected();
  });
}

bool send_message(Endpoint& endpoint, std::span<const std::byte> message) {
  return eventually([&] { return endpoint.send(message) == PostStatus::kPosted; });
}

std::vector<std::byte> receive_message(Endpoint& endpoint) {
  std::vector<std::byte> buffer(wire::kMessageBytesMax);
  size_t length_bytes = 0;
  while ((length_bytes = endpoint.receive(buffer)) == 0) {
    if (endpoint.disconnected() || !wait_ready(endpoint, kPatience)) break;
  }
  buffer.resize(length_bytes);
  return buffer;
}

size_t count_entries(const char* directory) {
  DIR* entries = ::opendir(directory);
  VMG_CHECK(entries != nullptr);
  size_t count = 0;
  while (::readdir(entries) != nullptr) ++count;
  ::closedir(entries);
  return count;
}

}  // namespace vmigrate::transport
