#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace w4a4 {
namespace {

constexpr int kMaxPhases = 4;
constexpr int kSpins = 1500;  // about 20 microseconds

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One call.  Workers hold it by shared_ptr: one that comes late finds nothing left to claim and
// never touches the caller's memory, which is gone by then.
struct Job {
  const Phase* phases;
  int count;
  int64_t items[kMaxPhases];
  std::atomic<int64_t> next[kMaxPhases];
  std::atomic<int64_t> done[kMaxPhases];
  std::atomic<int> seats;  // workers still wanted

  // Work on items until all are done; returns how long it had to wait for others' items.
  Clock::duration help() {
    Clock::duration waited{};
    for (int p = 0; p < count; ++p) {
      for (;;) {
        const int64_t item = next[p].fetch_add(1, std::memory_order_relaxed);
        if (item >= items[p]) break;
        phases[p].work(item);
        done[p].fetch_add(1, std::memory_order_acq_rel);
      }
      if (done[p].load(std::memory_order_acquire) == items[p]) continue;
      const Clock::time_point begin = Clock::now();
      for (int spin = 0; done[p].load(std::memory_order_acquire) < items[p]; ++spin)
        if (spin < kSpins) pause(); else sched_yield();
      waited += Clock::now() - begin;
    }
    return waited;
  }
};

void run_alone(const Phase* phases, int count) {
  for (int p = 0; p < count; ++p)
    for (int64_t item = 0; item < phases[p].items; ++item) phases[p].work(item);
}

// Time the calling thread has spent on a processor.
Clock::duration processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

// Whether help is worth asking for.  On a busy machine it is not: a worker is interrupted in the
// middle of an item and the caller waits for it; or the worker, just woken, pushes the caller off its
// processor, and others get their turn before the caller does.  Either costs a time slice, many times
// what a call takes, and would happen again and again.  One call that lost more time than it worked may
// be chance; after two within a short while the next ones are made alone, then help is tried again.
class Trust {
 public:
  bool ask() {
    int alone = alone_.load(std::memory_order_relaxed);
    while (alone > 0)
      if (alone_.compare_exchange_weak(alone, alone - 1, std::memory_order_relaxed)) return false;
    return true;
  }

  void learn(Clock::duration worked, Clock::duration lost) {
    const int64_t calls = since_.fetch_add(1, std::memory_order_relaxed) + 1;
    if (lost <= worked + kLate) return;
    since_.store(0, std::memory_order_relaxed);
    if (calls <= kSoon) alone_.store(kAlone, std::memory_order_relaxed);
  }

 private:
  // Longer than an item of any path takes beyond the caller's own share, shorter than a time slice.
  static constexpr Clock::duration kLate = std::chrono::microseconds(200);
  static constexpr int kSoon = 32, kAlone = 512;  // calls
  std::atomic<int> alone_{0};          // calls still to be made without help
  std::atomic<int64_t> since_{kSoon};  // calls since the last that lost time
};

class Pool {
 public:
  void run(const Phase* phases, int count, int threads, bool brief) {
    if (!brief) {
      with_help(phases, count, threads);
      return;
    }
    if (!trust_.ask()) return run_alone(phases, count);
    // From before workers are woken: that is when one may take the caller's processor.
    const Clock::time_point begin = Clock::now();
    const Clock::duration before = processor_time();
    const Clock::duration waited = with_help(phases, count, threads);
    // Waiting, the caller is on its processor at times and off it at others.
    const Clock::duration worked = std::max(processor_time() - before - waited, Clock::duration{});
    trust_.learn(worked, Clock::now() - begin - worked);
  }

 private:
  // Returns how long the caller waited for items of workers.
  Clock::duration with_help(const Phase* phases, int count, int threads) {
    auto job = std::make_shared<Job>();
    job->phases = phases;
    job->count = count;
    for (int p = 0; p < count; ++p) {
      job->items[p] = phases[p].items;
      job->next[p].store(0, std::memory_order_relaxed);
      job->done[p].store(0, std::memory_order_relaxed);
    }
    job->seats.store(threads - 1, std::memory_order_relaxed);
    int asleep = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_) < threads - 1) start();
      job_ = job;
      epoch_.fetch_add(1, std::memory_order_release);
      asleep = asleep_;
    }
    if (asleep > 0) wake_.notify_all();
    return job->help();
  }

  void start() {
    ++workers_;
    std::thread([this] { serve(); }).detach();
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) pause();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        --asleep_;
        seen = epoch_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job && job->seats.fetch_sub(1, std::memory_order_relaxed) > 0) job->help();
    }
  }

  Trust trust_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> epoch_{0};
  int workers_ = 0;
  int asleep_ = 0;
};

// Never destroyed: workers outlive main(), and a forked child must not join threads it never had.
Pool* pool = nullptr;
std::once_flag made;

void make_pool() {
  pool = new Pool;
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
}

}  // namespace

void run_phases(const Phase* phases, int count, int threads, bool brief) {
  if (threads <= 1) return run_alone(phases, count);
  std::call_once(made, make_pool);
  pool->run(phases, count, threads, brief);
}

}  // namespace w4a4
