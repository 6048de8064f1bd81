// A pool of worker threads that help with one call at a time.
//
// Work is a range of items claimed one by one.  The caller claims items too and only ever waits for
// items that a worker has begun, never for a worker to wake up: on a busy machine a call takes no
// longer than it would on one thread, unless a worker is interrupted in the middle of an item.  Where
// that keeps happening, brief calls are made alone for a while.  Workers spin briefly, because the next
// call of a network usually follows at once, then sleep.  After fork() the child starts with an empty
// pool.
#pragma once
#include <cstdint>
#include <functional>

namespace w4a4 {

struct Phase {
  int64_t items;
  std::function<void(int64_t item)> work;
};

// Run the phases one after the other on up to `threads` threads, the caller included.  `brief`: the
// call takes less than a time slice, so that a lost one matters more than the help.
void run_phases(const Phase* phases, int count, int threads, bool brief);

}  // namespace w4a4
