// Replaces the provider verbs in a build without the verbs headers.

#include "multicast/verbs/port.hpp"

namespace vmigrate::multicast {

Result<std::unique_ptr<DatagramPort>> open_verbs_port(const Group&, Role) {
  return Error{ErrorCode::kUnsupported, 0,
               "built without RDMA: install the packages libibverbs-dev and librdmacm-dev, and build again"};
}

}  // namespace vmigrate::multicast
