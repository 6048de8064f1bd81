// One call: split it into items and run its phases; and the conversion of weights to panels.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "pool.h"
#include "w4a4.h"

namespace w4a4 {
namespace {

constexpr int64_t kItemMacs = 1 << 21;   // about 10 microseconds: long against claiming an item
constexpr int64_t kBriefMacs = 1 << 28;  // one or two milliseconds: less than a time slice
constexpr int64_t kItemElements = 1 << 15;   // the same of what is done number by number
constexpr int64_t kBriefElements = 1 << 21;

struct Freer {
  void operator()(void* p) const { std::free(p); }
};

// Memory of one thread that grows to what the largest call needed.  Reused, because fresh pages cost
// more than a small call.
class Arena {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char, Freer> memory_;
  size_t size_ = 0;
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void run(const Path& path, const Problem& given, int threads) {
  if (given.M == 0 || given.N == 0) return;
  thread_local Arena shared;  // written by all threads of this call
  Problem p = given;
  p.ldq = p.padded + kRowAlign;  // not a power of two, so that rows do not share cache sets
  const size_t q = aligned(static_cast<size_t>(p.M * p.ldq));
  const size_t start = aligned(static_cast<size_t>(p.M * p.groups) * 4);
  char* base = shared.at_least(q + start + aligned(static_cast<size_t>(p.M) * 4));
  p.q = reinterpret_cast<int8_t*>(base);
  p.start = reinterpret_cast<int32_t*>(base + q);
  p.row_scale = reinterpret_cast<float*>(base + q + start);

  const int64_t rows = std::max<int64_t>(1, std::min(kRowChunk, (p.M + threads - 1) / threads));
  const int64_t per_panel = std::max<int64_t>(1, p.M * p.padded * kPanel);
  const int64_t panels = std::max<int64_t>(1, std::min(kItemMacs / per_panel, p.panels() / (4 * threads)));
  const auto scratch_bytes = aligned(static_cast<size_t>(scratch_floats(p)) * 4);
  const auto sum_bytes = aligned(static_cast<size_t>(p.M * kPanel) * 4);

  const Phase phases[2] = {
      {(p.M + rows - 1) / rows,
       [&](int64_t item) {
         thread_local Arena own;
         auto* scratch = reinterpret_cast<float*>(own.at_least(scratch_bytes));
         path.quantize(p, item * rows, std::min(p.M, (item + 1) * rows), scratch);
       }},
      {(p.panels() + panels - 1) / panels,
       [&](int64_t item) {
         thread_local Arena own;
         char* memory = own.at_least(kUnpackedBytes + 2 * sum_bytes);
         path.multiply(p, item * panels, std::min(p.panels(), (item + 1) * panels),
                       reinterpret_cast<int32_t*>(memory + kUnpackedBytes),
                       reinterpret_cast<float*>(memory + kUnpackedBytes + sum_bytes),
                       reinterpret_cast<uint8_t*>(memory));
       }},
  };
  run_phases(phases, 2, threads, p.M * p.N * p.K < kBriefMacs);
}

// Rows of `width` numbers, in items that are long against claiming one.
template <class Problem, class Rows>
static void run_rows(const Problem& problem, Rows rows_of_path, int64_t rows, int64_t width, int threads) {
  const int64_t per_item = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, width));
  if (rows <= per_item) return rows_of_path(problem, 0, rows);
  const Phase phase{(rows + per_item - 1) / per_item, [&](int64_t item) {
                      rows_of_path(problem, item * per_item, std::min(rows, (item + 1) * per_item));
                    }};
  run_phases(&phase, 1, threads, rows * width < kBriefElements);
}

void run(const Path& path, const Gated& p, int threads) { run_rows(p, path.gate, p.M, p.N, threads); }

void run(const Path& path, const Normalized& p, int threads) {
  run_rows(p, path.normalize, p.M, p.N, threads);
}

void run(const Path& path, const Rotated& p, int threads) {
  run_rows(p, path.rotate, p.B * p.T, p.H * 2 * p.half, threads);
}

// Eight nibbles of a word to eight bytes.
static inline uint64_t spread(uint32_t word) {
  uint64_t v = word;
  v = (v | v << 16) & 0x0000ffff0000ffffull;
  v = (v | v << 8) & 0x00ff00ff00ff00ffull;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
}

static inline uint32_t gather(uint64_t bytes) {
  uint64_t v = bytes & 0x0f0f0f0f0f0f0f0full;
  v = (v | v >> 4) & 0x00ff00ff00ff00ffull;
  v = (v | v >> 8) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(v | v >> 16);
}

constexpr uint32_t kZeros = 0x88888888u;  // eight weights of zero

static void one_panel(const uint32_t* words, int64_t N, int64_t K, int64_t padded, int64_t p, uint8_t* panel) {
  const int64_t width = (K + 7) / 8;
  for (int64_t w = 0; w < padded / 8; ++w)
    for (int64_t o = 0; o < 16; ++o) {
      const int64_t low = p * kPanel + o, high = low + 16;
      const uint32_t a = low < N && w < width ? words[low * width + w] : kZeros;
      const uint32_t b = high < N && w < width ? words[high * width + w] : kZeros;
      const uint64_t both = spread(a) | spread(b) << 4;
      uint8_t* unit = panel + 2 * w * kUnit + 4 * o;
      __builtin_memcpy(unit, &both, 4);
      const uint32_t second = static_cast<uint32_t>(both >> 32);
      __builtin_memcpy(unit + kUnit, &second, 4);
    }
}

void to_panels(const uint32_t* words, int64_t N, int64_t K, int64_t padded, int threads, uint8_t* panels) {
  const int64_t bytes = padded / 4 * kUnit;
  const Phase phase{(N + kPanel - 1) / kPanel,
                    [&](int64_t p) { one_panel(words, N, K, padded, p, panels + p * bytes); }};
  run_phases(&phase, 1, threads, false);
}

void from_panels(const uint8_t* panels, int64_t N, int64_t K, int64_t padded, int threads, uint32_t* words) {
  const int64_t width = (K + 7) / 8;
  // Nibbles past the end of a row are stored as 0.
  const uint32_t last = K % 8 ? (1u << 4 * (K % 8)) - 1 : 0xffffffffu;
  const Phase phase{N, [&](int64_t n) {
    for (int64_t w = 0; w < width; ++w) {
      const uint8_t* unit = panels + (n / kPanel * (padded / 4) + 2 * w) * kUnit + 4 * (n % 16);
      uint32_t first, second;
      __builtin_memcpy(&first, unit, 4);
      __builtin_memcpy(&second, unit + kUnit, 4);
      const uint64_t both = first | static_cast<uint64_t>(second) << 32;
      words[n * width + w] = gather(n % kPanel < 16 ? both : both >> 4) & (w + 1 == width ? last : 0xffffffffu);
    }
  }};
  run_phases(&phase, 1, threads, false);
}

}  // namespace w4a4
