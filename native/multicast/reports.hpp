#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "multicast/datagram/auth.hpp"
#include "multicast/datagram/port.hpp"
#include "multicast/pacer.hpp"
#include "multicast/page_plan.hpp"

namespace vmigrate::multicast {

/// What the sender knows of one receiver.
struct MemberStatistics {
  uint16_t member = 0;
  uint64_t received_bytes = 0;
  uint64_t sent_datagrams = 0;  ///< as far as this receiver can know
  uint64_t lost_datagrams = 0;
};

/// The sender's ear: takes reports that receivers of this session have made, and drops everything else. The
/// sender's thread owns it; members() and rejected() are for any thread.
class ReportListener final : public DatagramVisitor {
 public:
  /// `plan` learns which pages are wanted.
  ReportListener(DatagramAuth& auth, uint64_t session, Pacer& pacer)
      : auth_(auth), session_(session), pacer_(pacer) {}

  /// Reads all that has arrived. `next_sequence`: no receiver can have seen this one yet.
  Status listen(DatagramPort& port, PagePlan& plan, uint64_t next_sequence, uint64_t at_ns);
  /// When the last report came; 0: none.
  uint64_t heard_ns() const { return heard_ns_; }

  std::vector<MemberStatistics> members() const;

 private:
  struct Heard {
    MemberStatistics statistics;
    uint64_t sequence = 0;
  };
  void on_datagram(std::span<const std::byte> datagram) override;
  bool is_newest_of(uint16_t member, uint64_t sequence, const wire::MulticastReport& report);

  DatagramAuth& auth_;
  const uint64_t session_;
  Pacer& pacer_;
  PagePlan* plan_ = nullptr;  ///< during listen
  uint64_t next_sequence_ = 0, at_ns_ = 0;
  uint64_t heard_ns_ = 0;
  mutable std::mutex mutex_;  // guards heard_: reports are rare
  std::vector<Heard> heard_;
};

}  // namespace vmigrate::multicast
