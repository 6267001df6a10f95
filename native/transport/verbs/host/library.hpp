#pragma once

// Our own names for the functions of the verbs libraries. The libraries are loaded at run time, so that the
// addon loads on machines without them; only their headers are needed to build. The functions that the
// headers define inline (post_send, poll_cq, req_notify_cq) use the device's table of operations and need no
// symbol.

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#include "base/result.hpp"

namespace vmigrate::transport {

// clang-format off
#define VMG_IBV_FUNCTIONS(X)                                                             \
  X(alloc_pd) X(dealloc_pd) X(reg_mr) X(dereg_mr) X(create_comp_channel)                 \
  X(destroy_comp_channel) X(create_cq) X(destroy_cq) X(get_cq_event) X(ack_cq_events)    \
  X(modify_qp) X(query_device) X(get_device_list) X(free_device_list)                    \
  X(get_device_name) X(open_device) X(close_device) X(query_gid) X(create_ah)            \
  X(destroy_ah)
#define VMG_RDMA_FUNCTIONS(X)                                                            \
  X(create_event_channel) X(destroy_event_channel) X(create_id) X(destroy_id)            \
  X(bind_addr) X(resolve_addr) X(resolve_route) X(create_qp) X(destroy_qp) X(connect)    \
  X(listen) X(accept) X(reject) X(disconnect) X(get_cm_event) X(ack_cm_event)            \
  X(set_option) X(join_multicast_ex) X(leave_multicast)
// clang-format on

struct VerbsLibrary {
  struct {
#define VMG_DECLARE(name) decltype(&::ibv_##name) name = nullptr;
    VMG_IBV_FUNCTIONS(VMG_DECLARE)
#undef VMG_DECLARE
  } ibv;
  struct {
#define VMG_DECLARE(name) decltype(&::rdma_##name) name = nullptr;
    VMG_RDMA_FUNCTIONS(VMG_DECLARE)
#undef VMG_DECLARE
  } rdma;
};

/// Loads the libraries at the first call, once for the life of the process. kUnsupported: not installed; the
/// message names the package. Any thread.
Status load_verbs();

/// Call it only after load_verbs() has succeeded.
const VerbsLibrary& verbs();

}  // namespace vmigrate::transport
