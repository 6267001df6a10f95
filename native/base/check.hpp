#pragma once

#include <cstdio>
#include <cstdlib>

/// Guards an invariant of our own, in release builds too. Input from a peer or the kernel is never CHECKed;
/// it gives a Result. The daemon may stop safely: the VMs live in other processes, and the preload keeps
/// their userfaultfds open.
#define VMG_CHECK(condition)                                                                 \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      std::fprintf(stderr, "%s:%d: invariant broken: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                          \
    }                                                                                        \
  } while (0)
