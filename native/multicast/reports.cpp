#include "multicast/reports.hpp"

#include <algorithm>
#include <cstring>

#include "base/page_key.hpp"
#include "multicast/datagram/header.hpp"

namespace vmigrate::multicast {

Status ReportListener::listen(DatagramPort& port, PagePlan& plan, uint64_t next_sequence, uint64_t at_ns) {
  plan_ = &plan;
  next_sequence_ = next_sequence;
  at_ns_ = at_ns;
  // A flood of datagrams must not keep the sender from sending.
  for (int i = 0; i < 4; ++i) {
    const auto count = port.receive(*this);
    if (!count) return count.error();
    if (count.value() == 0) break;
  }
  return ok();
}

void ReportListener::on_datagram(std::span<const std::byte> datagram) {
  const auto header = parse_header(datagram);
  const auto report = parse_record<wire::MulticastReport>(datagram);
  if (!header || !report || header->session != session_ || header->member == kSenderMember ||
      header->kind != static_cast<uint8_t>(DatagramKind::kReport) || !auth_.verify(datagram)) {
    return;
  }
  // A member that says it has what nobody has sent is broken or lies.
  if (report->highest_sequence >= next_sequence_ || report->received_datagrams > report->highest_sequence ||
      report->wanted_count > wire::kMulticastWantedMax ||
      !is_newest_of(header->member, header->sequence, *report)) {
    return;
  }
  heard_ns_ = at_ns_;
  pacer_.report(
      header->member,
      {report->clock_ns, report->highest_sequence, report->received_datagrams, report->received_bytes},
      at_ns_);
  for (uint32_t i = 0; i < report->wanted_count; ++i) {
    uint64_t wanted;
    std::memcpy(&wanted, report->wanted + i * sizeof(wanted), sizeof(wanted));
    constexpr uint64_t kPageMask = (uint64_t{1} << pager::kPageKeyPageBits) - 1;
    plan_->want(static_cast<uint32_t>(wanted >> pager::kPageKeyPageBits), PageIndex{wanted & kPageMask});
  }
}

/// Keeps what the report says, unless a newer one of this member has come, or there are too many members.
bool ReportListener::is_newest_of(uint16_t member, uint64_t sequence, const wire::MulticastReport& report) {
  const std::lock_guard lock(mutex_);
  auto found = std::find_if(heard_.begin(), heard_.end(),
                            [&](const Heard& one) { return one.statistics.member == member; });
  if (found == heard_.end()) {
    if (heard_.size() == kMembersMax) return false;
    found = heard_.insert(found, Heard{});
  } else if (sequence <= found->sequence) {
    return false;
  }
  *found = {{member, report.received_bytes, report.highest_sequence,
             report.highest_sequence - report.received_datagrams},
            sequence};
  return true;
}

std::vector<MemberStatistics> ReportListener::members() const {
  const std::lock_guard lock(mutex_);
  std::vector<MemberStatistics> all;
  for (const Heard& one : heard_) all.push_back(one.statistics);
  return all;
}

}  // namespace vmigrate::multicast
