#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "transport/transport.hpp"

namespace vmigrate::test {

/// A provider that only records what was exposed, so that tests can check the memory itself.
struct Exposed {
  transport::LocalMemory memory;
  transport::Access access;
};
struct Bookkeeping {
  std::vector<Exposed> exposed;
  std::atomic<bool> session_alive{false};
  bool fills_holes = false;
};

class BookSession final : public transport::ExposedSession {
 public:
  explicit BookSession(Bookkeeping& book) : book_(book) { book_.session_alive = true; }
  ~BookSession() override { book_.session_alive = false; }
  Result<transport::RemoteKey> expose(const transport::LocalMemory& memory,
                                      transport::Access access) override {
    book_.exposed.push_back({memory, access});
    if (book_.fills_holes) {
      // Through the mapping, as an RDMA device would.
      for (uint64_t at = 0; at < memory.length_bytes; at += wire::kPageBytesMin) {
        const auto page = reinterpret_cast<volatile uint8_t*>(memory.base) + at;
        *page = *page;
      }
    }
    return transport::RemoteKey{
        .address = 0, .key = book_.exposed.size(), .length_bytes = memory.length_bytes};
  }
  transport::PostStatus send(transport::Channel, std::span<const std::byte>) override {
    return transport::PostStatus::kDisconnected;
  }
  transport::ExposedSessionCounters counters() const override {
    return {.read_count = 3, .read_bytes = 4096, .connections = 2, .cpu_ns = 5};
  }

 private:
  Bookkeeping& book_;
};

class BookListener final : public transport::Listener {
 public:
  explicit BookListener(Bookkeeping& book) : book_(book) {}
  Result<std::unique_ptr<transport::ExposedSession>> expose_session(const transport::Credentials&,
                                                                    transport::MessageHandler,
                                                                    void*) override {
    return std::unique_ptr<transport::ExposedSession>(std::make_unique<BookSession>(book_));
  }
  transport::Address address() const override { return {}; }
  uint64_t rejected_hellos() const override { return 7; }
  bool fills_holes() const override { return book_.fills_holes; }

 private:
  Bookkeeping& book_;
};

}  // namespace vmigrate::test
