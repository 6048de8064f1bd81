// After a worker kept the caller waiting, calls are made alone for a while, then help is asked again.
//
// An item that a worker gets takes much longer than the caller's own, as if the worker had been
// interrupted.  Prints how many calls in a row were made alone after the first and the second wait.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "pool.h"

namespace {

using std::chrono::milliseconds;

// One call of two items on two threads; returns whether a worker took part.
bool helped() {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> taken{false};
  const w4a4::Phase phase{2, [&](int64_t) {
    const bool mine = std::this_thread::get_id() == caller;
    if (!mine) taken = true;
    // The caller's own takes long enough for a worker to wake up and claim the other.
    std::this_thread::sleep_for(milliseconds(mine ? 2 : 10));
  }};
  w4a4::run_phases(&phase, 1, 2);
  return taken;
}

}  // namespace

int main() {
  while (!helped()) {
  }
  for (int wait = 0; wait < 2; ++wait) {
    int alone = 0;
    while (!helped()) ++alone;
    std::printf("%d\n", alone);
  }
  return 0;
}
