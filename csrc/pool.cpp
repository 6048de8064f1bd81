#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
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

  void help() {
    for (int p = 0; p < count; ++p) {
      for (;;) {
        const int64_t item = next[p].fetch_add(1, std::memory_order_relaxed);
        if (item >= items[p]) break;
        phases[p].work(item);
        done[p].fetch_add(1, std::memory_order_acq_rel);
      }
      for (int spin = 0; done[p].load(std::memory_order_acquire) < items[p]; ++spin)
        if (spin < kSpins) pause(); else sched_yield();
    }
  }
};

class Pool {
 public:
  void run(const Phase* phases, int count, int threads) {
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
    job->help();
  }

 private:
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

void run_phases(const Phase* phases, int count, int threads) {
  if (threads <= 1) {
    for (int p = 0; p < count; ++p)
      for (int64_t item = 0; item < phases[p].items; ++item) phases[p].work(item);
    return;
  }
  std::call_once(made, make_pool);
  pool->run(phases, count, threads);
}

}  // namespace w4a4
