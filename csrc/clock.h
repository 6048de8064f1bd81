// Timing loops for peak rates.  Everything is static: each path compiles its own copy.
#pragma once
#include <cstdint>
#include <ctime>

namespace w4a4 {

static inline double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

static inline void keep(int64_t value) { asm volatile("" : : "r"(value) : "memory"); }

// Multiply-adds per second of a loop with `macs` of them an iteration: the best of batches of about
// a millisecond within `seconds`, since anything that interrupts a batch only slows it.
template <class Loop>
static double macs_per_second(double seconds, double macs, Loop loop) {
  const int64_t batch = 1 << 15;
  const double end = seconds_now() + seconds;
  double best = 0.0;
  do {
    const double begin = seconds_now();
    loop(batch);
    const double rate = macs * static_cast<double>(batch) / (seconds_now() - begin);
    if (rate > best) best = rate;
  } while (seconds_now() < end);
  return best;
}

}  // namespace w4a4
