// Measures the speed of the available RDMA hosts, without vmigrate and with it:
//
//   floor      a bare loop fault -> RDMA READ of one page -> UFFDIO_CONTINUE, one fault at a time; as the
//              thread that faults sees it, and from the fault read to the thread woken ("served")
//   bareBulk   bare RDMA READs of 1 MiB, several outstanding
//   endpoint   the same READs through the provider `verbs`
//
//   verbs_bench [PAGES [BULK_MIB]]     prints one JSON document; exits with 1 if there is no RDMA device
//
// The first RDMA address of this machine serves, the last one asks, so the bytes cross the wire where there
// are two.

#if __has_include(<infiniband/verbs.h>) && __has_include(<rdma/rdma_cma.h>)

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "base/check.hpp"
#include "base/unique_fd.hpp"
#include "transport/verbs/host/cm.hpp"
#include "transport/verbs/provider.hpp"

namespace vmigrate::transport {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kBulkBytes = wire::kTransferBytesMax;
constexpr size_t kBulkDepth = 8;

using Clock = std::chrono::steady_clock;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

template <typename T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "verbs_bench: %s (errno %d)\n", result.error().what, result.error().system_errno);
    std::exit(1);
  }
  return std::move(result).value();
}

struct Percentiles {
  double p50 = 0, p90 = 0, p99 = 0;
  explicit Percentiles(std::vector<double> samples) {
    std::sort(samples.begin(), samples.end());
    const auto at = [&](double share) { return samples[static_cast<size_t>(share * (samples.size() - 1))]; };
    p50 = at(0.5);
    p90 = at(0.9);
    p99 = at(0.99);
  }
};

/// A file in memory, mapped twice like a VM's region: once for the guest, once for the device.
struct Region {
  explicit Region(uint64_t bytes) : length_bytes(bytes), fd(::memfd_create("verbs-bench", MFD_CLOEXEC)) {
    VMG_CHECK(fd.valid() && ::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0);
    guest = map();
    device = map();
  }
  ~Region() {
    ::munmap(guest, length_bytes);
    ::munmap(device, length_bytes);
  }
  std::byte* map() const {
    void* mapping = ::mmap(nullptr, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    VMG_CHECK(mapping != MAP_FAILED);
    return static_cast<std::byte*>(mapping);
  }
  LocalMemory memory() const { return LocalMemory{device, fd.get(), 0, length_bytes}; }

  uint64_t length_bytes;
  UniqueFd fd;
  std::byte* guest = nullptr;
  std::byte* device = nullptr;
};

SocketAddress address_of(const std::string& host, uint16_t port) {
  return must(tcp_socket_address(Address{host, port}));
}

/// Two queue pairs of this process, connected to each other, with nothing around them.
struct BareConnection {
  BareConnection(const std::string& serving, const std::string& asking);
  void read(std::byte* local, uint32_t lkey, uint64_t remote, uint32_t rkey, uint32_t bytes) const;
  void wait() const;

  EventChannel channel;
  CmId listening, served_id, asking_id;
  ProtectionDomain served_pd, asking_pd;
  CompletionQueue served_cq, asking_cq;
  QueuePair served_qp, asking_qp;
};

void create(rdma_cm_id* id, ProtectionDomain& pd, CompletionQueue& cq, QueuePair& qp) {
  pd.reset(verbs().ibv.alloc_pd(id->verbs));
  VMG_CHECK(pd != nullptr);
  cq = must(CompletionQueue::create(id->verbs, 64, nullptr, nullptr));
  uint32_t inline_bytes = 0;
  must(create_queue_pair(id, pd.get(), cq.get(), cq.get(), {.send_entries = 32, .receive_entries = 1}, qp,
                         &inline_bytes));
}

// One channel for both ends, so their events come in turn and one thread handles both.
BareConnection::BareConnection(const std::string& serving, const std::string& asking)
    : channel(must(open_event_channel())) {
  listening = must(bind_cm_id(channel.get(), address_of(serving, 0)));
  VMG_CHECK(verbs().rdma.listen(listening.get(), 1) == 0);
  asking_id = must(create_cm_id(channel.get(), nullptr));
  must(apply_options(asking_id.get(), {}));
  SocketAddress from = address_of(asking, 0);
  SocketAddress to = address_of(serving, local_port(listening.get()));
  VMG_CHECK(verbs().rdma.resolve_addr(asking_id.get(), reinterpret_cast<sockaddr*>(&from.storage),
                                      reinterpret_cast<sockaddr*>(&to.storage), 5000) == 0);
  rdma_conn_param parameters{};
  parameters.retry_count = 7;
  parameters.rnr_retry_count = 7;
  parameters.initiator_depth = 16;
  parameters.responder_resources = 16;
  for (int established = 0; established < 2;) {
    VMG_CHECK(wait_for(channel->fd, POLLIN, Clock::now() + std::chrono::seconds(10)) == 0);
    rdma_cm_event* event = nullptr;
    if (verbs().rdma.get_cm_event(channel.get(), &event) != 0) continue;
    const rdma_cm_event_type type = event->event;
    if (type == RDMA_CM_EVENT_CONNECT_REQUEST) served_id.reset(event->id);
    (void)verbs().rdma.ack_cm_event(event);
    switch (type) {
      case RDMA_CM_EVENT_ADDR_RESOLVED:
        VMG_CHECK(verbs().rdma.resolve_route(asking_id.get(), 5000) == 0);
        break;
      case RDMA_CM_EVENT_ROUTE_RESOLVED: {
        create(asking_id.get(), asking_pd, asking_cq, asking_qp);
        parameters.initiator_depth = must(query_device(asking_id->verbs)).reads_as_requester_max;
        VMG_CHECK(verbs().rdma.connect(asking_id.get(), &parameters) == 0);
        break;
      }
      case RDMA_CM_EVENT_CONNECT_REQUEST: {
        must(apply_options(served_id.get(), {}));
        create(served_id.get(), served_pd, served_cq, served_qp);
        parameters.responder_resources = must(query_device(served_id->verbs)).reads_as_responder_max;
        VMG_CHECK(verbs().rdma.accept(served_id.get(), &parameters) == 0);
        break;
      }
      case RDMA_CM_EVENT_ESTABLISHED:
        ++established;
        break;
      default:
        std::fprintf(stderr, "verbs_bench: connection event %d\n", type);
        std::exit(1);
    }
  }
}

void BareConnection::read(std::byte* local, uint32_t lkey, uint64_t remote, uint32_t rkey,
                          uint32_t bytes) const {
  ibv_sge element{reinterpret_cast<uintptr_t>(local), bytes, lkey};
  ibv_send_wr request{};
  request.sg_list = &element;
  request.num_sge = 1;
  request.opcode = IBV_WR_RDMA_READ;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.rdma.remote_addr = remote;
  request.wr.rdma.rkey = rkey;
  ibv_send_wr* rejected = nullptr;
  VMG_CHECK(::ibv_post_send(asking_qp.get(), &request, &rejected) == 0);
}

void BareConnection::wait() const {
  ibv_wc completion{};
  int count = 0;
  while ((count = ::ibv_poll_cq(asking_cq.get(), 1, &completion)) == 0) {
  }
  VMG_CHECK(count == 1 && completion.status == IBV_WC_SUCCESS);
}

struct FaultTimes {
  std::vector<double> seen_us, served_us;
};

/// Faults on all pages of `region`, far apart, one at a time. A second thread serves them.
FaultTimes fault_all(const BareConnection& connection, const Region& region, const ibv_mr& local,
                     const ibv_mr& remote) {
  UniqueFd uffd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_MINOR_SHMEM;
  VMG_CHECK(uffd.valid() && ::ioctl(uffd.get(), UFFDIO_API, &api) == 0);
  const uint64_t base = reinterpret_cast<uintptr_t>(region.guest);
  uffdio_register registration{};
  registration.range = {base, region.length_bytes};
  registration.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
  VMG_CHECK(::ioctl(uffd.get(), UFFDIO_REGISTER, &registration) == 0);

  const uint64_t page_count = region.length_bytes / kPageBytes;
  FaultTimes times;
  times.seen_us.reserve(page_count);
  times.served_us.reserve(page_count);
  std::thread pager([&] {
    for (uint64_t served = 0; served < page_count;) {
      pollfd entry{uffd.get(), POLLIN, 0};
      (void)::poll(&entry, 1, -1);
      uffd_msg message{};
      if (::read(uffd.get(), &message, sizeof message) != sizeof message) continue;
      const auto start = Clock::now();
      const uint64_t offset = (message.arg.pagefault.address - base) & ~(kPageBytes - 1);
      connection.read(region.device + offset, local.lkey, reinterpret_cast<uintptr_t>(remote.addr) + offset,
                      remote.rkey, kPageBytes);
      connection.wait();
      uffdio_continue done{};
      done.range = {base + offset, kPageBytes};
      VMG_CHECK(::ioctl(uffd.get(), UFFDIO_CONTINUE, &done) == 0);
      times.served_us.push_back(us_since(start));
      ++served;
    }
  });
  for (uint64_t i = 0; i < page_count; ++i) {
    const uint64_t offset = i * 7919 % page_count * kPageBytes;
    const auto start = Clock::now();
    const volatile auto* word = reinterpret_cast<const volatile uint64_t*>(region.guest + offset);
    VMG_CHECK(*word == offset + 1);
    times.seen_us.push_back(us_since(start));
  }
  pager.join();
  return times;
}

double bare_bulk_mib_s(const BareConnection& connection, const Region& region, const ibv_mr& local,
                       const ibv_mr& remote, uint64_t total_bytes) {
  const uint64_t count = total_bytes / kBulkBytes;
  const uint64_t places = region.length_bytes / kBulkBytes;
  const auto start = Clock::now();
  for (uint64_t posted = 0, done = 0; done < count; ++done) {
    for (; posted < count && posted < done + kBulkDepth; ++posted) {
      const uint64_t offset = posted % places * kBulkBytes;
      connection.read(region.device + offset, local.lkey, reinterpret_cast<uintptr_t>(remote.addr) + offset,
                      remote.rkey, kBulkBytes);
    }
    connection.wait();
  }
  return static_cast<double>(count * kBulkBytes >> 20) / us_since(start) * 1e6;
}

struct EndpointFigures {
  Percentiles read_us;
  double bulk_mib_s;
};

/// Waits like the owners: for a page by polling, for bulk on event_fd when no completion is ready.
size_t wait_completions(Endpoint& endpoint, std::span<Completion> out, bool polls) {
  endpoint.set_polled(polls);
  for (;;) {
    const size_t count = endpoint.poll(out);
    for (size_t i = 0; i < count; ++i) VMG_CHECK(out[i].result == OpResult::kOk);
    if (count > 0) return count;
    if (polls) continue;
    pollfd entry{endpoint.event_fd(), POLLIN, 0};
    (void)::poll(&entry, 1, -1);
  }
}

EndpointFigures measure_endpoint(const std::string& serving, const std::string& asking, const Region& remote,
                                 const Region& local, uint64_t page_count, uint64_t total_bytes) {
  const auto listener = must(kVerbsProvider.listen(Address{serving, 0}, {}));
  Credentials credentials;
  credentials.token.fill(1);
  const auto session = must(listener->expose_session(credentials, nullptr, nullptr));
  const RemoteKey key = must(session->expose(remote.memory(), Access::kRead));
  const Options options = {{"localAddress", asking}};
  const auto connect = [&](Channel channel) {
    return must(
        kVerbsProvider.connect(listener->address(), credentials, channel, std::chrono::seconds(10), options));
  };
  const auto demand = connect(Channel::kDemand);
  const auto bulk = connect(Channel::kBulk);
  const LocalId demand_id = must(demand->register_local(local.memory()));
  const LocalId bulk_id = must(bulk->register_local(local.memory()));

  std::vector<double> samples;
  Completion completions[kBulkDepth];
  for (uint64_t i = 0; i <= page_count; ++i) {
    const uint64_t offset = i * 7919 % page_count * kPageBytes;
    const Operation operation{i, demand_id, offset, key, offset, kPageBytes};
    const auto start = Clock::now();
    VMG_CHECK(demand->read(std::span(&operation, 1)).posted == 1);
    (void)wait_completions(*demand, completions, true);
    if (i > 0) samples.push_back(us_since(start));  // the first READ asks for the key
  }
  const uint64_t count = total_bytes / kBulkBytes;
  const uint64_t places = local.length_bytes / kBulkBytes;
  const auto start = Clock::now();
  for (uint64_t posted = 0, done = 0; done < count;) {
    for (; posted < count && posted < done + kBulkDepth; ++posted) {
      const uint64_t offset = posted % places * kBulkBytes;
      const Operation operation{posted, bulk_id, offset, key, offset, kBulkBytes};
      VMG_CHECK(bulk->read(std::span(&operation, 1)).posted == 1);
    }
    done += wait_completions(*bulk, completions, false);
  }
  return {Percentiles(std::move(samples)),
          static_cast<double>(count * kBulkBytes >> 20) / us_since(start) * 1e6};
}

int run(uint64_t page_count, uint64_t total_bytes) {
  const auto addresses = must(verbs_places());
  if (addresses.empty()) {
    std::fprintf(stderr, "verbs_bench: no address here belongs to an active RDMA port\n");
    return 1;
  }
  const uint64_t length_bytes = std::max(page_count * kPageBytes, kBulkDepth * kBulkBytes);
  const Region remote(length_bytes), local(length_bytes);
  for (uint64_t at = 0; at < length_bytes; at += kPageBytes)
    *reinterpret_cast<uint64_t*>(remote.guest + at) = at + 1;

  FaultTimes faults;
  double bare_mib_s = 0;
  {
    const BareConnection connection(addresses.front().address, addresses.back().address);
    const MemoryRegion local_mr(
        verbs().ibv.reg_mr(connection.asking_pd.get(), local.device, length_bytes, IBV_ACCESS_LOCAL_WRITE));
    const MemoryRegion remote_mr(
        verbs().ibv.reg_mr(connection.served_pd.get(), remote.device, length_bytes, IBV_ACCESS_REMOTE_READ));
    VMG_CHECK(local_mr != nullptr && remote_mr != nullptr);
    faults = fault_all(connection, local, *local_mr, *remote_mr);
    bare_mib_s = bare_bulk_mib_s(connection, local, *local_mr, *remote_mr, total_bytes);
  }
  const Percentiles floor(std::move(faults.seen_us)), served(std::move(faults.served_us));
  const EndpointFigures ours = measure_endpoint(addresses.front().address, addresses.back().address, remote,
                                                local, length_bytes / kPageBytes, total_bytes);
  std::printf(
      "{\"serving\":\"%s\",\"asking\":\"%s\",\"pages\":%llu,\"floor\":{\"p50Us\":%.1f,\"p90Us\":%.1f,"
      "\"p99Us\":%.1f,\"servedP50Us\":%.1f,\"servedP99Us\":%.1f},"
      "\"bareBulkMibS\":%.1f,\"endpoint\":{\"readP50Us\":%.1f,\"readP99Us\":%.1f,\"bulkMibS\":%.1f}}\n",
      addresses.front().address.c_str(), addresses.back().address.c_str(),
      static_cast<unsigned long long>(length_bytes / kPageBytes), floor.p50, floor.p90, floor.p99, served.p50,
      served.p99, bare_mib_s, ours.read_us.p50, ours.read_us.p99, ours.bulk_mib_s);
  return 0;
}

}  // namespace
}  // namespace vmigrate::transport

int main(int argument_count, char** arguments) {
  const auto argument = [&](int index, uint64_t otherwise) {
    return argument_count > index ? std::strtoull(arguments[index], nullptr, 10) : otherwise;
  };
  return vmigrate::transport::run(std::max<uint64_t>(1, argument(1, 2048)), argument(2, 256) << 20);
}

#else

#include <cstdio>

int main() {
  std::fprintf(stderr,
               "verbs_bench: built without RDMA: libibverbs-dev or librdmacm-dev was not installed\n");
  return 1;
}

#endif
