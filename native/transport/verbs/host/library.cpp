#include "transport/verbs/host/library.hpp"

#include <dlfcn.h>

#include "base/check.hpp"

namespace vmigrate::transport {
namespace {

struct Loaded {
  VerbsLibrary library;
  Status status = ok();
};

template <typename Function>
bool resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(handle, name));
  return function != nullptr;
}

Loaded load() {
  Loaded loaded;
  const auto missing = [&loaded](const char* what) {
    loaded.status = Error{ErrorCode::kUnsupported, 0, what};
    return loaded;
  };
  void* ibverbs = ::dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (ibverbs == nullptr)
    return missing("RDMA needs libibverbs.so.1: install the packages libibverbs1 and ibverbs-providers");
  void* rdmacm = ::dlopen("librdmacm.so.1", RTLD_NOW | RTLD_LOCAL);
  if (rdmacm == nullptr) return missing("RDMA needs librdmacm.so.1: install the package librdmacm1");
  bool complete = true;
#define VMG_RESOLVE(name) complete &= resolve(ibverbs, "ibv_" #name, loaded.library.ibv.name);
  VMG_IBV_FUNCTIONS(VMG_RESOLVE)
#undef VMG_RESOLVE
#define VMG_RESOLVE(name) complete &= resolve(rdmacm, "rdma_" #name, loaded.library.rdma.name);
  VMG_RDMA_FUNCTIONS(VMG_RESOLVE)
#undef VMG_RESOLVE
  if (!complete) return missing("the installed libibverbs1 or librdmacm1 is too old");
  return loaded;
}

const Loaded& loaded_once() {
  static const Loaded loaded = load();
  return loaded;
}

}  // namespace

Status load_verbs() {
  return loaded_once().status;
}

const VerbsLibrary& verbs() {
  const Loaded& loaded = loaded_once();
  VMG_CHECK(loaded.status.ok());
  return loaded.library;
}

}  // namespace vmigrate::transport
