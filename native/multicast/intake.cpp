#include "multicast/intake.hpp"

#include <algorithm>

namespace vmigrate::multicast {

bool Intake::take(std::span<const std::byte> datagram) {
  const auto header = parse_header(datagram);
  const auto is = [&](DatagramKind kind) { return header->kind == static_cast<uint8_t>(kind); };
  const bool is_ours = header && header->session == session_ && header->member == kSenderMember &&
                       (is(DatagramKind::kData) || is(DatagramKind::kEnd));
  // The tag last, because it costs the most.
  if (!is_ours || !auth_.verify(datagram)) {
    ++counted_.rejected_datagrams;
    return false;
  }
  take_genuine(*header, datagram);
  return true;
}

void Intake::take_genuine(const DatagramHeader& header, std::span<const std::byte> datagram) {
  if (!window_.note(header.sequence)) {
    ++counted_.repeated_datagrams;
    return;
  }
  ++counted_.received_datagrams;
  counted_.received_bytes += datagram.size();
  if (header.kind == static_cast<uint8_t>(DatagramKind::kEnd)) {
    const auto end = parse_record<wire::MulticastEnd>(datagram);
    if (!end) {
      ++counted_.rejected_datagrams;
      return;
    }
    has_end_ = true;
    counted_.sent_pages = end->pages;
    return;
  }
  if (!assembler_.add(header.region, header.offset, payload_of(datagram))) ++counted_.rejected_datagrams;
}

ReceiverCounters Intake::counters() const {
  ReceiverCounters counters = counted_;
  counters.lost_datagrams = window_.highest() - std::min(window_.highest(), counted_.received_datagrams);
  counters.evicted_pages = assembler_.evicted_pages();
  return counters;
}

}  // namespace vmigrate::multicast
