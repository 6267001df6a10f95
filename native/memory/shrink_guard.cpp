// Reading behind the end of a mapped file raises a signal. The handler jumps back to the code that was about
// to read. Other signals go to the handler that was installed before.

#include "memory/shrink_guard.hpp"

#include <csetjmp>
#include <csignal>

namespace vmigrate::memory {
namespace {

thread_local sigjmp_buf* way_back = nullptr;
struct sigaction previous;

void on_bus_error(int signal, siginfo_t*, void*) {
  if (way_back != nullptr) ::siglongjmp(*way_back, 1);
  // This signal is not ours. The instruction runs again and then meets the action that was installed before.
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
  // If this signal is blocked, as in our threads, it ends the process.
  ::pthread_sigmask(SIG_UNBLOCK, &bus_error, &before);
  sigjmp_buf here;
  volatile bool whole = false;  // keeps its value when the handler jumps back here
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
