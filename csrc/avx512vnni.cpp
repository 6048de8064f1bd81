// AVX-512 with VNNI: vpdpbusd multiplies 4 unsigned by 4 signed bytes and adds them to an int32, so
// nothing ever has to be widened.  12 rows x 32 outputs take 24 of the 32 registers.
#include <immintrin.h>

#include "clock.h"
#include "w4a4.h"

namespace w4a4 {
namespace {

// In assembly because GCC 12 copies both accumulators around every _mm512_dpbusd_epi32, which halves
// the rate.
static inline void dot(__m512i& sum, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

struct Avx512Vnni {
  static constexpr int kRows = 12;
  static constexpr int64_t kTransformRows = 6;

  // T stays as it is stored.  bfloat16 is the upper half of a float32, so of 32 neighbouring columns
  // the even ones are shifted up and the odd ones masked; the sums are put in order at the end.
  template <int R>
  static inline void transform_tile(const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    __m512 acc[R][4];  // even and odd columns of the first 32, then of the last
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int k = 0; k < kBlock; ++k) {
      __m512 t[4];
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m512i pairs = _mm512_loadu_si512(T + k * kBlock + c * 32);
        __builtin_prefetch(T + (k + kBlock) * kBlock + c * 32);  // the next block's
        t[2 * c] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        t[2 * c + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 v = _mm512_set1_ps(x[r * ldx + k]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_fmadd_ps(v, t[c], acc[r][c]);
      }
    }
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m512 even = acc[r][2 * c], odd = acc[r][2 * c + 1];
        _mm512_storeu_ps(y + r * ldy + c * 32, _mm512_permutex2var_ps(even, first, odd));
        _mm512_storeu_ps(y + r * ldy + c * 32 + 16, _mm512_permutex2var_ps(even, last, odd));
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

  static inline __mmask16 mask(int64_t left) {
    return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  }

  static float abs_max(const float* y, int64_t n) {
    __m512 a = _mm512_setzero_ps(), b = a;
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
      a = _mm512_max_ps(a, _mm512_abs_ps(_mm512_loadu_ps(y + k)));
      b = _mm512_max_ps(b, _mm512_abs_ps(_mm512_loadu_ps(y + k + 16)));
    }
    for (; k < n; k += 16)
      a = _mm512_max_ps(a, _mm512_abs_ps(_mm512_maskz_loadu_ps(mask(n - k), y + k)));
    return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
  }

  static void quantize(const float* y, int64_t n, float inverse, float low, float high, int8_t* q) {
    const __m512 s = _mm512_set1_ps(inverse), lo = _mm512_set1_ps(low), hi = _mm512_set1_ps(high);
    for (int64_t k = 0; k < n; k += 16) {
      const __mmask16 m = mask(n - k);
      __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, y + k), s);
      v = _mm512_min_ps(_mm512_max_ps(v, lo), hi);
      _mm_mask_storeu_epi8(q + k, m, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
    }
  }

  static void unpack(const uint8_t* units, int64_t steps, uint8_t* out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t j = 0; j < steps; ++j) {
      __builtin_prefetch(units + j * kUnit + kUnpackSteps * kUnit, 0, 2);
      const __m512i v = _mm512_loadu_si512(units + j * kUnit);
      _mm512_store_si512(out + j * 128, _mm512_and_si512(v, nibble));
      _mm512_store_si512(out + j * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
    }
  }

  template <int R, bool kUnpacked>
  static inline void tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t, int32_t* out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] = _mm512_loadu_si512(out + r * kPanel);
      acc[r][1] = _mm512_loadu_si512(out + r * kPanel + 16);
    }
    for (int64_t j = 0; j < steps; ++j) {
      __m512i w0, w1;
      if constexpr (kUnpacked) {
        w0 = _mm512_load_si512(w);
        w1 = _mm512_load_si512(w + 64);
        w += 128;
      } else {
        __builtin_prefetch(w + kPrefetch);
        const __m512i v = _mm512_loadu_si512(w);
        w0 = _mm512_and_si512(v, nibble);
        w1 = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        w += kUnit;
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * lda, 4);
        const __m512i x = _mm512_set1_epi32(four);
        dot(acc[r][0], w0, x);
        dot(acc[r][1], w1, x);
      }
      a += 4;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_si512(out + r * kPanel, acc[r][0]);
      _mm512_storeu_si512(out + r * kPanel + 16, acc[r][1]);
    }
  }

  static void fold(const int32_t* acc, const float* scale, float* sum, bool first) {
    for (int c = 0; c < 32; c += 16) {
      const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(acc + c)),
                                     _mm512_loadu_ps(scale + c));
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + c);
      _mm512_storeu_ps(sum + c, _mm512_add_ps(before, v));
    }
  }

  static inline void store(__m512 v, float s, const float* bias, float* out, int64_t left) {
    v = _mm512_mul_ps(v, _mm512_set1_ps(s));
    if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias));
    if (left > 0) _mm512_mask_storeu_ps(out, mask(left), v);
  }

  static void finish(const int32_t* acc, const float* scale, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 16)
      store(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(acc + c)), _mm512_loadu_ps(scale + c)), s,
            bias ? bias + c : nullptr, out + c, n - c);
  }

  static void finish(const float* sum, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 16)
      store(_mm512_loadu_ps(sum + c), s, bias ? bias + c : nullptr, out + c, n - c);
  }
};

#include "driver.h"
#include "elementwise_driver.h"

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

double peak(double seconds) {
  const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(-2);
  return macs_per_second(seconds, 24 * 64.0, [w, x](int64_t iterations) {
    __m512i acc[24];
#pragma GCC unroll 24
    for (int c = 0; c < 24; ++c) acc[c] = _mm512_setzero_si512();
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < 24; ++c) dot(acc[c], w, x);
    }
#pragma GCC unroll 24
    for (int c = 0; c < 24; ++c) keep(_mm_cvtsi128_si32(_mm512_castsi512_si128(acc[c])));
  });
}

}  // namespace

extern const Path kAvx512Vnni{"avx512-vnni", runs_here, quantize_rows<Avx512Vnni>, multiply_panels<Avx512Vnni>,
                      gate_rows, normalize_rows, rotate_rows, peak};

}  // namespace w4a4
