// What a policy computes between its linears: gates, norms with their modulation, rotary positions.
//
//   gate       y = f(a) * b             f(a) = a / (1 + exp(-t)), t = a (silu)
//                                       or t = 2 sqrt(2/pi) (a + 0.044715 a^3) (gelu by tanh)
//   normalize  y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * (base + scale) + shift
//   rotate     (u, v) -> (u cos - v sin, v cos + u sin), u and v the halves of a head
//
// With tanh(z) = 2 / (1 + exp(-2 z)) - 1 both activations are one division and one exponential,
// and that is e^t = 2^n e^r, n = round(t / ln 2), |r| <= ln 2 / 2, with e^r a polynomial of degree 7
// (Cephes' coefficients, relative error 2^-23).  Where e^-t is infinite the quotient is 0.
//
// All numbers are float32, and sums are made in 16 lanes that are then added in pairs; no product is
// fused with a sum.  So all instruction sets give equal bits, as they do for linears.
#pragma once
#include <cstdint>

namespace w4a4 {

struct Gated {
  const float* gate;  // [M, N], rows ldg apart
  int64_t ldg;
  const float* up;    // [M, N], rows ldu apart; null for f(gate) alone
  int64_t ldu;
  float* out;         // [M, N], without gaps
  int64_t M, N;
  bool silu;          // else gelu
};

struct Normalized {
  const float* x;      // [M, N], rows ldx apart
  int64_t ldx;
  const float* scale;  // row m reads row m / share, rows lds apart; null for a factor of 1
  const float* shift;  // the same; null for none
  float base;          // 1 where scales are offsets from one, 0 where they are the factors
  int64_t lds, share;
  float* out;          // [M, N], without gaps
  int64_t M, N;
  float eps;
  bool centred;        // take the mean away; else mean = 0
};

struct Rotated {
  const float* x;           // [B, T, H, 2 half], at these distances
  int64_t xb, xt, xh;
  const float *cosine, *sine;  // [B or 1, T, half], chunks `table` apart (0: one for all)
  int64_t table;
  float* out;               // [B, H, T, 2 half], without gaps
  int64_t B, T, H, half;
};

}  // namespace w4a4
