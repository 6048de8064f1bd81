// AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds pairs into int16.  With 4-bit
// weights a pair is at most 2 * 15 * 8 = 240 for 4-bit activations, so 136 of them fit before they
// have to be widened with vpmaddwd (2 * 15 * 128 = 3840 and 8 for 8-bit ones).  6 rows x 16 outputs
// take 12 of the 16 registers; a panel is done in two halves, outputs 8 h .. 8 h + 7 and 16 more.
#include <immintrin.h>

#include "clock.h"
#include "w4a4.h"

namespace w4a4 {
namespace {

// sum += products of weights (unsigned) and x (signed), pairs added.  Both instructions in one piece of
// assembly, because GCC 12 first computes all products of a step and then adds them, runs out of
// registers and keeps the accumulators on the stack, which halves the rate.
static inline void multiply_add(__m256i& sum, __m256i weights, __m256i x) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(weights), "x"(x));
}

struct Avx2 {
  static constexpr int kRows = 6;
  static constexpr int64_t kTransformRows = 6;

  // T stays as it is stored.  bfloat16 is the upper half of a float32, so of 16 neighbouring columns
  // the even ones are shifted up and the odd ones masked; the sums are put in order at the end.
  template <int R>
  static inline void transform_tile(const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    for (int n = 0; n < kBlock; n += 16) {
      __m256 acc[R][2];  // even and odd columns
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
      for (int k = 0; k < kBlock; ++k) {
        const auto* at = reinterpret_cast<const __m256i*>(T + k * kBlock + n);
        const __m256i pairs = _mm256_loadu_si256(at);
        if (n % 32 == 0) __builtin_prefetch(at + kBlock * kBlock / 16);  // the next block's
        const __m256 t0 = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 t1 = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m256 v = _mm256_broadcast_ss(x + r * ldx + k);
          acc[r][0] = _mm256_fmadd_ps(v, t0, acc[r][0]);
          acc[r][1] = _mm256_fmadd_ps(v, t1, acc[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 a = _mm256_unpacklo_ps(acc[r][0], acc[r][1]);  // columns 0-3 and 8-11
        const __m256 b = _mm256_unpackhi_ps(acc[r][0], acc[r][1]);  // columns 4-7 and 12-15
        _mm256_storeu_ps(y + r * ldy + n, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(y + r * ldy + n + 8, _mm256_permute2f128_ps(a, b, 0x31));
      }
    }
  }

  static void transform(int64_t rows, const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    switch (rows) {
      case 1: return transform_tile<1>(x, ldx, T, y, ldy);
      case 2: return transform_tile<2>(x, ldx, T, y, ldy);
      case 3: return transform_tile<3>(x, ldx, T, y, ldy);
      case 4: return transform_tile<4>(x, ldx, T, y, ldy);
      case 5: return transform_tile<5>(x, ldx, T, y, ldy);
      default: return transform_tile<6>(x, ldx, T, y, ldy);
    }
  }

  static float abs_max(const float* y, int64_t n) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 a = _mm256_setzero_ps(), b = a;
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
      a = _mm256_max_ps(a, _mm256_and_ps(magnitude, _mm256_loadu_ps(y + k)));
      b = _mm256_max_ps(b, _mm256_and_ps(magnitude, _mm256_loadu_ps(y + k + 8)));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(a, b));
    float largest = 0.0f;
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    for (; k < n; ++k) {
      const float v = y[k] < 0 ? -y[k] : y[k];
      largest = v > largest ? v : largest;
    }
    return largest;
  }

  static void quantize(const float* y, int64_t n, float inverse, float low, float high, int8_t* q) {
    const __m256 s = _mm256_set1_ps(inverse), lo = _mm256_set1_ps(low), hi = _mm256_set1_ps(high);
    const auto round = [&](const float* from) {
      const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(from), s);
      return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, lo), hi));
    };
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within 128 bits
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
      const __m256i low16 = _mm256_packs_epi32(round(y + k), round(y + k + 8));
      const __m256i high16 = _mm256_packs_epi32(round(y + k + 16), round(y + k + 24));
      const __m256i bytes = _mm256_packs_epi16(low16, high16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k), _mm256_permutevar8x32_epi32(bytes, order));
    }
    for (; k < n; ++k) {
      __m128 v = _mm_mul_ss(_mm_load_ss(y + k), _mm_set_ss(inverse));
      v = _mm_min_ss(_mm_max_ss(v, _mm_set_ss(low)), _mm_set_ss(high));
      q[k] = static_cast<int8_t>(_mm_cvtss_si32(v));
    }
  }

  // Both halves one after the other: [half][step][outputs 8 h .. | outputs 16 + 8 h ..].
  static void unpack(const uint8_t* units, int64_t steps, uint8_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t j = 0; j < steps; ++j)
      for (int64_t h = 0; h < 2; ++h) {
        __builtin_prefetch(units + j * kUnit + kUnpackSteps * kUnit, 0, 2);
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units + j * kUnit + h * 32));
        uint8_t* to = out + (h * kUnpackSteps + j) * 64;
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(v, nibble));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32),
                           _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
      }
  }

  template <int R, bool kUnpacked>
  static inline void half_tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t widen,
                               int32_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t j0 = 0; j0 < steps; j0 += widen) {
      const int64_t end = j0 + widen < steps ? j0 + widen : steps;
      __m256i acc[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
      for (int64_t j = j0; j < end; ++j) {
        __m256i w0, w1;
        if constexpr (kUnpacked) {
          w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
          w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
        } else {
          __builtin_prefetch(w + kPrefetch);
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          w0 = _mm256_and_si256(v, nibble);
          w1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
        }
        w += 64;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t four;
          __builtin_memcpy(&four, a + r * lda, 4);
          const __m256i x = _mm256_set1_epi32(four);
          multiply_add(acc[r][0], w0, x);
          multiply_add(acc[r][1], w1, x);
        }
        a += 4;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          auto* to = reinterpret_cast<__m256i*>(out + r * kPanel + 16 * c);
          _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_madd_epi16(acc[r][c], ones)));
        }
    }
  }

  template <int R, bool kUnpacked>
  static inline void tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t widen,
                          int32_t* out) {
    for (int64_t h = 0; h < 2; ++h)
      half_tile<R, kUnpacked>(a, lda, w + h * (kUnpacked ? kUnpackSteps * 64 : 32), steps, widen, out + 8 * h);
  }

  static void fold(const int32_t* acc, const float* scale, float* sum, bool first) {
    for (int c = 0; c < 32; c += 8) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + c));
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_loadu_ps(scale + c));
      const __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sum + c);
      _mm256_storeu_ps(sum + c, _mm256_add_ps(before, scaled));
    }
  }

  static inline void store(__m256 v, float s, const float* bias, float* out, int64_t left) {
    v = _mm256_mul_ps(v, _mm256_set1_ps(s));
    if (bias) v = _mm256_add_ps(v, _mm256_loadu_ps(bias));
    if (left >= 8) {
      _mm256_storeu_ps(out, v);
    } else if (left > 0) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, v);
      __builtin_memcpy(out, lanes, static_cast<size_t>(left) * 4);
    }
  }

  static void finish(const int32_t* acc, const float* scale, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 8) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + c));
      store(_mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_loadu_ps(scale + c)), s, bias ? bias + c : nullptr,
            out + c, n - c);
    }
  }

  static void finish(const float* sum, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 8)
      store(_mm256_loadu_ps(sum + c), s, bias ? bias + c : nullptr, out + c, n - c);
  }
};

#include "driver.h"
#include "elementwise_driver.h"

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

double peak(double seconds) {
  return macs_per_second(seconds, 12 * 32.0, [](int64_t iterations) {
    const __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(-2);
    __m256i acc[12];
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) acc[c] = _mm256_setzero_si256();
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < 12; ++c) multiply_add(acc[c], w, x);
    }
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) keep(_mm_cvtsi128_si32(_mm256_castsi256_si128(acc[c])));
  });
}

}  // namespace

extern const Path kAvx2{"avx2", runs_here, quantize_rows<Avx2>, multiply_panels<Avx2>,
                      gate_rows, normalize_rows, rotate_rows, peak};

}  // namespace w4a4
