// Armv8.2 with the dot-product extension: sdot multiplies 4 signed bytes by 4 and adds them to an
// int32.  Weights w + 8 <= 15 are as good signed as unsigned.  8 rows x 8 outputs take 16 registers;
// a panel is done in four quarters, outputs 4 h .. 4 h + 3 and 16 more.
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "clock.h"
#include "w4a4.h"

namespace w4a4 {
namespace {

struct NeonDot {
  static constexpr int kRows = 8;
  static constexpr int64_t kTransformRows = 4;

  template <int R>
  static inline void transform_tile(const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    for (int n = 0; n < kBlock; n += 16) {
      float32x4_t acc[R][4];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) acc[r][c] = vdupq_n_f32(0.0f);
      for (int k = 0; k < kBlock; ++k) {
        float32x4_t t[4];
        for (int c = 0; c < 4; ++c)  // bfloat16 is the upper half of a float32
          t[c] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(T + k * kBlock + n + 4 * c), 16));
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < 4; ++c) acc[r][c] = vfmaq_n_f32(acc[r][c], t[c], x[r * ldx + k]);
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) vst1q_f32(y + r * ldy + n + 4 * c, acc[r][c]);
    }
  }

  static void transform(int64_t rows, const float* x, int64_t ldx, const uint16_t* T, float* y, int64_t ldy) {
    switch (rows) {
      case 1: return transform_tile<1>(x, ldx, T, y, ldy);
      case 2: return transform_tile<2>(x, ldx, T, y, ldy);
      case 3: return transform_tile<3>(x, ldx, T, y, ldy);
      default: return transform_tile<4>(x, ldx, T, y, ldy);
    }
  }

  static float abs_max(const float* y, int64_t n) {
    float32x4_t a = vdupq_n_f32(0.0f);
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) a = vmaxq_f32(a, vabsq_f32(vld1q_f32(y + k)));
    float largest = vmaxvq_f32(a);
    for (; k < n; ++k) {
      const float v = y[k] < 0 ? -y[k] : y[k];
      largest = v > largest ? v : largest;
    }
    return largest;
  }

  static void quantize(const float* y, int64_t n, float inverse, float low, float high, int8_t* q) {
    const float32x4_t lo = vdupq_n_f32(low), hi = vdupq_n_f32(high);
    const auto round = [&](float32x4_t v) {
      return vcvtnq_s32_f32(vminq_f32(vmaxq_f32(vmulq_n_f32(v, inverse), lo), hi));
    };
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
      const int16x8_t v = vcombine_s16(vmovn_s32(round(vld1q_f32(y + k))), vmovn_s32(round(vld1q_f32(y + k + 4))));
      vst1_s8(q + k, vmovn_s16(v));
    }
    for (; k < n; ++k) q[k] = static_cast<int8_t>(vgetq_lane_s32(round(vdupq_n_f32(y[k])), 0));
  }

  // Quarter by quarter: [quarter][step][outputs 4 h .. | outputs 16 + 4 h ..].
  static void unpack(const uint8_t* units, int64_t steps, uint8_t* out) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    for (int64_t j = 0; j < steps; ++j)
      for (int64_t h = 0; h < 4; ++h) {
        const uint8x16_t v = vld1q_u8(units + j * kUnit + h * 16);
        uint8_t* to = out + (h * kUnpackSteps + j) * 32;
        vst1q_u8(to, vandq_u8(v, nibble));
        vst1q_u8(to + 16, vshrq_n_u8(v, 4));
      }
  }

  template <int R, bool kUnpacked>
  static inline void quarter_tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int32_t* out) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    int32x4_t acc[R][2];
    for (int r = 0; r < R; ++r) {
      acc[r][0] = vld1q_s32(out + r * kPanel);
      acc[r][1] = vld1q_s32(out + r * kPanel + 16);
    }
    for (int64_t j = 0; j < steps; ++j) {
      int8x16_t w0, w1;
      if constexpr (kUnpacked) {
        w0 = vreinterpretq_s8_u8(vld1q_u8(w));
        w1 = vreinterpretq_s8_u8(vld1q_u8(w + 16));
        w += 32;
      } else {
        const uint8x16_t v = vld1q_u8(w);
        w0 = vreinterpretq_s8_u8(vandq_u8(v, nibble));
        w1 = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
        w += kUnit;
      }
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * lda, 4);
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
        acc[r][0] = vdotq_s32(acc[r][0], w0, x);
        acc[r][1] = vdotq_s32(acc[r][1], w1, x);
      }
      a += 4;
    }
    for (int r = 0; r < R; ++r) {
      vst1q_s32(out + r * kPanel, acc[r][0]);
      vst1q_s32(out + r * kPanel + 16, acc[r][1]);
    }
  }

  template <int R, bool kUnpacked>
  static inline void tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps, int64_t, int32_t* out) {
    for (int64_t h = 0; h < 4; ++h)
      quarter_tile<R, kUnpacked>(a, lda, w + h * (kUnpacked ? kUnpackSteps * 32 : 16), steps, out + 4 * h);
  }

  static void fold(const int32_t* acc, const float* scale, float* sum, bool first) {
    for (int c = 0; c < 32; c += 4) {
      const float32x4_t v = vmulq_f32(vcvtq_f32_s32(vld1q_s32(acc + c)), vld1q_f32(scale + c));
      vst1q_f32(sum + c, vaddq_f32(first ? vdupq_n_f32(0.0f) : vld1q_f32(sum + c), v));
    }
  }

  static inline void store(float32x4_t v, float s, const float* bias, float* out, int64_t left) {
    v = vmulq_n_f32(v, s);
    if (bias) v = vaddq_f32(v, vld1q_f32(bias));
    if (left >= 4) {
      vst1q_f32(out, v);
    } else if (left > 0) {
      float lanes[4];
      vst1q_f32(lanes, v);
      __builtin_memcpy(out, lanes, static_cast<size_t>(left) * 4);
    }
  }

  static void finish(const int32_t* acc, const float* scale, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 4)
      store(vmulq_f32(vcvtq_f32_s32(vld1q_s32(acc + c)), vld1q_f32(scale + c)), s, bias ? bias + c : nullptr,
            out + c, n - c);
  }

  static void finish(const float* sum, float s, const float* bias, float* out, int64_t n) {
    for (int c = 0; c < 32; c += 4) store(vld1q_f32(sum + c), s, bias ? bias + c : nullptr, out + c, n - c);
  }
};

#include "driver.h"
#include "elementwise_driver.h"

bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return true;  // every 64-bit Apple processor has it
#endif
}

double peak(double seconds) {
  return macs_per_second(seconds, 16 * 16.0, [](int64_t iterations) {
    const int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(-2);
    int32x4_t acc[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) acc[c] = vdupq_n_s32(0);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) {
        acc[c] = vdotq_s32(acc[c], w, x);
        asm volatile("" : "+w"(acc[c]));
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) keep(vgetq_lane_s32(acc[c], 0));
  });
}

}  // namespace

extern const Path kNeonDot{"neon-dotprod", runs_here, quantize_rows<NeonDot>, multiply_panels<NeonDot>,
                      gate_rows, normalize_rows, rotate_rows, peak};

}  // namespace w4a4
