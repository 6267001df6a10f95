// Reading behind the end of a mapped file is a signal. The handler jumps back to who was about to read;
// signals of everybody else go to whoever had them before.

#include "memory/shrink_guard.hpp"

#include <csetjmp>
#include <csignal>

namespace vmigrate::memory {
namespace {

thread_local sigjmp_buf* way_back = nullptr;
struct sigaction previous;

void on_bus_error(int signal, siginfo_t*, void*) {
  if (way_back != nullptr) ::siglongjmp(*way_back, 1);
  // Not ours. The instruction is tried again, and this time meets the action that was there before.
  ::sigaction(signal, &previous, nullptr);
}

bool install() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  return ::sigaction(SIGBUS, &action, &previous) == 0;
}

}  // namespace

bool touch_guarded(void (*touch)(void*), void* context) {
  static const bool installed = install();
  if (!installed) return false;
  sigset_t bus_error, before;
  ::sigemptyset(&bus_error);
  ::sigaddset(&bus_error, SIGBUS);
  // Blocked, as in our threads, it would end the process.
  ::pthread_sigmask(SIG_UNBLOCK, &bus_error, &before);
  sigjmp_buf here;
  volatile bool whole = false;  // so that it is what it was when the handler comes back here
  if (sigsetjmp(here, 1) == 0) {
    way_back = &here;
    touch(context);
    whole = true;
  }
  way_back = nullptr;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return whole;
}

}  // namespace vmigrate::memory
