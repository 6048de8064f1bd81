// After workers kept the caller waiting, calls are made alone for a while, then help is asked again.
//
// An item that a worker gets takes much longer than the caller's own, as if the worker had been
// interrupted.  Prints how many calls had help before that, and how many in a row then had none.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "pool.h"

namespace {

using std::chrono::milliseconds;

constexpr int kSpell = 100;  // more calls in a row than a worker misses by chance

void compute(milliseconds duration) {
  const auto end = std::chrono::steady_clock::now() + duration;
  while (std::chrono::steady_clock::now() < end) {
  }
}

// One call of two items on two threads; returns whether a worker took part.
bool helped() {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> taken{false};
  const w4a4::Phase phase{2, [&](int64_t) {
    const bool mine = std::this_thread::get_id() == caller;
    if (!mine) taken = true;
    // The caller's own is work, and takes long enough for a worker to wake up and claim the other.
    if (mine) compute(milliseconds(2));
    else std::this_thread::sleep_for(milliseconds(10));
  }};
  w4a4::run_phases(&phase, 1, 2, true);
  return taken;
}

}  // namespace

int main() {
  int asked = 0, alone = 0;
  while (alone < kSpell) {  // two calls that lose time, close together
    const bool took_part = helped();
    asked += took_part;
    alone = took_part ? 0 : alone + 1;
    if (asked > 100) return 1;
  }
  while (!helped()) ++alone;
  std::printf("%d %d\n", asked, alone);
  return 0;
}
