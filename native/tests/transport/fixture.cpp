#include "tests/transport/fixture.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <sstream>

#include "base/check.hpp"

namespace vmigrate::transport {

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

Credentials make_credentials(uint8_t seed) {
  Credentials credentials;
  for (size_t i = 0; i < credentials.session.size(); ++i)
    credentials.session[i] = static_cast<uint8_t>(seed + i);
  for (size_t i = 0; i < credentials.token.size(); ++i)
    credentials.token[i] = static_cast<uint8_t>(seed * 3 + i);
  return credentials;
}

namespace {

struct RdmaAddresses {
  std::string missing;  ///< why there is none
  std::vector<std::string> addresses;
};

/// This machine's RDMA addresses: the first listens, the last connects. Found by a child, because a process
/// that has opened an RDMA device cannot use it after a fork, and a test forks.
RdmaAddresses find_rdma_addresses() {
  int pipes[2];
  VMG_CHECK(::pipe2(pipes, O_CLOEXEC) == 0);
  const pid_t child = ::fork();
  VMG_CHECK(child >= 0);
  if (child == 0) {
    const auto found = verbs_addresses();
    std::string text = found.ok() ? "" : std::string("!needs rdma: ") + found.error().what;
    if (found.ok() && found.value().empty())
      text = "!needs rdma: no address here belongs to an active RDMA port";
    if (found.ok())
      for (const std::string& address : found.value()) text += address + "\n";
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
  RdmaAddresses result;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) result.addresses.push_back(line);
  return result;
}

const RdmaAddresses& rdma_addresses() {
  static const RdmaAddresses addresses = find_rdma_addresses();
  return addresses;
}

}  // namespace

const char* name_of(Provider provider) {
  switch (provider) {
    case Provider::kTcp:
      return "tcp";
    case Provider::kShm:
      return "shm";
    case Provider::kVerbs:
      return "verbs";
  }
  return "none";
}

std::string missing_for(Provider provider) {
  if (provider != Provider::kVerbs) return {};
  return rdma_addresses().missing;
}

Address listen_address(Provider provider) {
  static std::atomic<int> number{0};
  if (provider == Provider::kVerbs) return Address{rdma_addresses().addresses.front(), 0};
  if (provider == Provider::kTcp) return Address{"127.0.0.1", 0};
  return Address{"/tmp/vmigrate-shm-" + std::to_string(::getpid()) + "-" + std::to_string(number++), 0};
}

Result<std::unique_ptr<Listener>> listen_at(Provider provider, const Address& address) {
  switch (provider) {
    case Provider::kTcp:
      return listen_tcp(address);
    case Provider::kShm:
      return listen_shm(address);
    case Provider::kVerbs:
      return listen_verbs(address);
  }
  return Error{ErrorCode::kInvalidArgument, 0, "no such provider"};
}

std::unique_ptr<Listener> must_listen(Provider provider) {
  auto listener = listen_at(provider, listen_address(provider));
  VMG_CHECK(listener.ok());
  return std::move(listener).value();
}

Result<std::unique_ptr<Endpoint>> connect(Provider provider, const Address& address,
                                          const Credentials& credentials, Channel channel) {
  if (provider == Provider::kVerbs)
    return connect_verbs(address, credentials, channel, kConnectTimeout,
                         VerbsOptions{.local_host = rdma_addresses().addresses.back()});
  return provider == Provider::kTcp ? connect_tcp(address, credentials, channel, kConnectTimeout)
                                    : connect_shm(address, credentials, channel, kConnectTimeout);
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
