// Plain C++: the path of last resort, and the yardstick of the others.
#include <cmath>

#include "clock.h"
#include "w4a4.h"

namespace w4a4 {
namespace {

static inline float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

struct Generic {
  static constexpr int kRows = 4;
  static constexpr int64_t kTransformRows = 4;

  static void transform(int64_t rows, const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < kBlock; ++n) {
        float sum = 0.0f;
        for (int64_t k = 0; k < kBlock; ++k) sum = std::fma(x[r * ldx + k], widened(T[k * kBlock + n]), sum);
        y[r * ldy + n] = sum;
      }
  }

  static float abs_max(const float* y, int64_t n) {
    float largest = 0.0f;
    for (int64_t k = 0; k < n; ++k) {
      const float v = std::fabs(y[k]);
      largest = v > largest ? v : largest;
    }
    return largest;
  }

  static void quantize(const float* y, int64_t n, float inverse, float low, float high, int8_t* q) {
    for (int64_t k = 0; k < n; ++k) {
      float v = y[k] * inverse;
      v = v > low ? v : low;
      v = v < high ? v : high;
      q[k] = static_cast<int8_t>(std::nearbyint(v));
    }
  }

  static void unpack(const uint8_t* units, int64_t steps, uint8_t* out) {
    for (int64_t j = 0; j < steps; ++j)
      for (int64_t b = 0; b < kUnit; ++b) {
        out[j * 128 + b] = units[j * kUnit + b] & 15;
        out[j * 128 + 64 + b] = units[j * kUnit + b] >> 4;
      }
  }

  template <int R, bool kUnpacked>
  static void tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t, int32_t* acc) {
    for (int64_t j = 0; j < steps; ++j)
      for (int r = 0; r < R; ++r)
        for (int o = 0; o < 16; ++o)
          for (int i = 0; i < 4; ++i) {
            const int32_t x = a[r * lda + 4 * j + i];
            const int64_t at = kUnpacked ? j * 128 + 4 * o + i : j * kUnit + 4 * o + i;
            acc[r * kPanel + o] += (kUnpacked ? w[at] : w[at] & 15) * x;
            acc[r * kPanel + 16 + o] += (kUnpacked ? w[at + 64] : w[at] >> 4) * x;
          }
  }

  static void fold(const int32_t* acc, const float* scale, float* sum, bool first) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float v = static_cast<float>(acc[n]) * scale[n];
      sum[n] = (first ? 0.0f : sum[n]) + v;
    }
  }

  static void finish(const int32_t* acc, const float* scale, float s, const float* bias, float* out, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
      const float v = static_cast<float>(acc[c]) * scale[c] * s;
      out[c] = bias ? v + bias[c] : v;
    }
  }

  static void finish(const float* sum, float s, const float* bias, float* out, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
      const float v = sum[c] * s;
      out[c] = bias ? v + bias[c] : v;
    }
  }
};

#include "driver.h"
#include "elementwise_driver.h"

bool runs_here() { return true; }

double peak(double seconds) {
  int32_t acc[16] = {};
  volatile int32_t w = 3, x = -2;
  const double rate = macs_per_second(seconds, 16.0, [&](int64_t iterations) {
    const int32_t a = w, b = x;
    for (int64_t i = 0; i < iterations; ++i)
      for (int c = 0; c < 16; ++c) {
        acc[c] += a * b;
        asm volatile("" : "+r"(acc[c]));
      }
  });
  keep(acc[0]);
  return rate;
}

}  // namespace

extern const Path kGeneric{"generic", runs_here, quantize_rows<Generic>, multiply_panels<Generic>,
                      gate_rows, normalize_rows, rotate_rows, peak};

}  // namespace w4a4
