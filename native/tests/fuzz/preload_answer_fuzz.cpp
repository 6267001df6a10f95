// The preload's end of its socket, inside QEMU: answers of an agent that may be anything.

#include <sys/socket.h>
#include <unistd.h>

#include "base/unique_fd.hpp"
#include "tests/fuzz/fuzz.hpp"

extern "C" {
#include "preload/preload.h"

// In the preload itself these stand in other files.
void vmg_complain(const char* /*format*/, ...) {}
int vmg_move_high(int fd) {
  return fd;
}
}

namespace vmigrate {

std::vector<fuzz::Seed> fuzz::seeds() {
  std::vector<Seed> all;
  for (uint16_t status = 0; status < 4; ++status) {
    const vmg_preload_ack ack{VMG_PRELOAD_MAGIC, VMG_PRELOAD_OP_ACK, status};
    all.push_back(Seed().add(ack));
    all.push_back(Seed().add(ack).fill(1, 0));
  }
  for (const uint32_t hold_ms : {0u, 1u, ~0u}) {
    const vmg_preload_trim trim{VMG_PRELOAD_MAGIC, VMG_PRELOAD_OP_TRIM, hold_ms};
    all.push_back(Seed().add(trim));
    all.push_back(Seed().add(trim).fill(1, 0));
  }
  all.push_back(Seed().fill(sizeof(vmg_preload_ack) - 1, 1));
  all.push_back(Seed());
  return all;
}

}  // namespace vmigrate

namespace {

/// The same bytes where QEMU calls malloc_trim: it does nothing only because the agent has said so, and only
/// while the agent is there.
void check_trim(const uint8_t* bytes, size_t length_bytes) {
  constexpr uint32_t kLongMs = 60'000;
  int ends[2];
  VMG_CHECK(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
  const vmigrate::UniqueFd own(ends[0]);
  vmigrate::UniqueFd agent(ends[1]);
  if (length_bytes != 0) VMG_CHECK(::send(agent.get(), bytes, length_bytes, 0) >= 0);
  vmg_preload_trim trim{};
  if (length_bytes == sizeof trim) std::memcpy(&trim, bytes, sizeof trim);
  const bool is_said = trim.magic == VMG_PRELOAD_MAGIC && trim.op == VMG_PRELOAD_OP_TRIM && trim.hold_ms != 0;
  const bool is_held = vmg_agent_holds_trim(own.get());
  VMG_CHECK(!is_held || is_said);
  VMG_CHECK(is_held || !is_said || trim.hold_ms < kLongMs);
  agent.reset();
  VMG_CHECK(!vmg_agent_holds_trim(own.get()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t length_bytes) {
  using vmigrate::UniqueFd;
  check_trim(bytes, length_bytes);
  int ends[2];
  VMG_CHECK(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd own(ends[0]);
  UniqueFd agent(ends[1]);
  if (length_bytes != 0) VMG_CHECK(::send(agent.get(), bytes, length_bytes, 0) >= 0);
  ::shutdown(agent.get(), SHUT_WR);
  const vmg_preload_region region{
      VMG_PRELOAD_MAGIC, VMG_PRELOAD_VERSION, VMG_PRELOAD_OP_REGION, 1, 2, 3, 4, 5, 6};
  const vmg_preload_ack right{VMG_PRELOAD_MAGIC, VMG_PRELOAD_OP_ACK, VMG_PRELOAD_STATUS_OK};
  const bool is_right = length_bytes == sizeof right && std::memcmp(bytes, &right, sizeof right) == 0;
  VMG_CHECK(vmg_agent_report(own.get(), &region) == is_right);
  vmg_preload_region got{};
  VMG_CHECK(::recv(agent.get(), &got, sizeof got, MSG_TRUNC) == sizeof got);
  VMG_CHECK(std::memcmp(&got, &region, sizeof got) == 0);
  // What was said while a mapping was reported ends with the agent, too, and with this input.
  agent.reset();
  VMG_CHECK(!vmg_agent_holds_trim(own.get()));
  return 0;
}
