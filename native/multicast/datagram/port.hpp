#pragma once

#include <memory>
#include <span>

#include "base/result.hpp"
#include "multicast/datagram/group.hpp"

namespace vmigrate::multicast {

/// Is shown the datagrams that a port has received.
class DatagramVisitor {
 public:
  /// One datagram, which may be anything. The bytes are valid during the call.
  virtual void on_datagram(std::span<const std::byte> datagram) = 0;

 protected:
  ~DatagramVisitor() = default;
};

/// One end of a group: datagrams to all who have joined it, and answers to where one came from. It promises
/// nothing: datagrams may be lost, repeated, reordered, or come from anybody. For one thread, except
/// event_fd.
class DatagramPort {
 public:
  virtual ~DatagramPort() = default;
  /// Largest datagram, with its DatagramHeader, that the group can be sent.
  virtual size_t datagram_bytes_max() const = 0;
  /// What a packet of the network has besides a datagram, without its link's own header.
  virtual size_t overhead_bytes() const = 0;
  /// Readable when receive() has something.
  virtual int event_fd() const = 0;

  /// Sends `bytes` to the group as datagrams of `datagram_bytes`, of which the last may be shorter: at most
  /// kBatchBytesMax and kBatchDatagramsMax. It may block for some milliseconds; datagrams that find no room
  /// even then are lost. An error means that none will ever pass.
  virtual Status send(std::span<const std::byte> bytes, size_t datagram_bytes) = 0;
  /// Shows some datagrams that have arrived, and returns how many; 0: there are none. Does not block.
  virtual Result<size_t> receive(DatagramVisitor& visitor) = 0;
  /// In on_datagram: answers go to where this datagram comes from, from now on.
  virtual void adopt_source() = 0;
  /// Sends one datagram to the source that was adopted, if there is one. It may be lost.
  virtual void answer(std::span<const std::byte> datagram) = 0;
};

enum class Role { kSender, kReceiver };

/// kUnsupported if this build has no such provider; kInvalidArgument, kNotFound or kSystem if the group, the
/// interface or the port cannot be used.
Result<std::unique_ptr<DatagramPort>> open_port(const Group& group, Role role);

}  // namespace vmigrate::multicast
