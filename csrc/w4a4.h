// One W4A4 linear layer: what it computes, how its operands lie in memory, and what an instruction
// set has to provide.
//
//   y[m,n] = s_x[m] * s_w[n] * sum_k q[m,k] w[n,k] + b[n]    q = clamp(round(x' / s_x)), x' = x T - o
//
// x is float32 [M, K]; T is block-diagonal with 64 x 64 blocks in bfloat16; o is an offset per channel
// whose product with the weight is in b; q is int8, w is int4.
//
// Weights are stored in *panels* of 32 outputs.  A panel is a row of units, one per 4 inputs; byte
// 4 o + i of unit j holds input 4 j + i of output o in its low nibble and of output 16 + o in its
// high one, each as w + 8:
//
//   panel p, unit j:   | o=0: k=4j 4j+1 4j+2 4j+3 | o=1: ... | ... | o=15: ... |     64 bytes
//
// That is the operand order of the dot-product instructions (four bytes of one output side by
// side), and one load and two masks give all 32 outputs.  Storing w + 8 makes the weight unsigned,
// which vpmaddubsw and vpdpbusd want; sum q (w + 8) - 8 sum q = sum q w is repaired by starting the
// accumulators at -8 sum q, computed where q is made.
//
// Every path rounds the same way: the transform is a chain of fused multiply-adds in the order of
// k, the offset is subtracted from what they give, quantization multiplies by the reciprocal of the scale and rounds halves to even, and the
// epilogue is ((float(sum) * s_w) * s_x) + b without contraction.  So all paths give equal bits.
#pragma once
#include <cstdint>

#include "elementwise.h"

namespace w4a4 {

constexpr int64_t kPanel = 32;       // outputs per panel
constexpr int64_t kUnit = 64;        // bytes per unit: 4 inputs of 32 outputs
constexpr int64_t kBlock = 64;       // width of a transform block
constexpr int64_t kRowAlign = 64;    // columns of q are padded to this

struct Problem {
  const float* x;             // [M, K], rows ldx apart
  int64_t ldx;
  const uint16_t* transform;  // bfloat16 [ceil(K/64), 64, 64], or null
  const float* offset;        // float32 [ceil(K/64) * 64], or [K] without a transform; or null
  const float* static_scale;  // one number, or null for one dynamic scale per row
  const uint8_t* weight;      // panels
  const float* weight_scale;  // [groups, panels * 32]
  const float* bias;          // [panels * 32], or null
  float* out;                 // [M, N], rows ldo apart
  int64_t ldo;
  int64_t M, N, K;
  int64_t padded;             // inputs per panel: K rounded up to kRowAlign (and to whole groups)
  int64_t group;              // inputs per weight scale; `padded` for one scale per output
  int64_t groups;
  int32_t low, high;          // range of the activation integers
  float clip = 1.0f;          // share of a row's largest magnitude that a dynamic scale reaches to
  // Workspace, filled by the first phase:
  int8_t* q;                  // [M, ldq]
  int64_t ldq;
  int32_t* start;             // [M, groups], -8 * sum of q over the group
  float* row_scale;           // [M]

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
};

// What one instruction set offers.  Rows and panels may be given out to threads in any split.
struct Path {
  const char* name;
  bool (*runs_here)();
  // Transform and quantize rows [m0, m1).  scratch: scratch_floats(problem) floats.
  void (*quantize)(const Problem&, int64_t m0, int64_t m1, float* scratch);
  // Multiply panels [p0, p1).  accumulators: M * 32 int32; sums: M * 32 floats (grouped only);
  // unpacked: kUnpackedBytes.
  void (*multiply)(const Problem&, int64_t p0, int64_t p1, int32_t* accumulators, float* sums,
                   uint8_t* unpacked);
  // What lies between linears (elementwise.h), rows [m0, m1).
  void (*gate)(const Gated&, int64_t m0, int64_t m1);
  void (*normalize)(const Normalized&, int64_t m0, int64_t m1);
  void (*rotate)(const Rotated&, int64_t m0, int64_t m1);
  // Multiply-adds per second of the inner instructions alone, operands in registers.
  double (*peak)(double seconds);
};

// How far ahead of their use weights are asked for, in bytes.  They come from memory at every call,
// and the processor's own prefetching ends at every page; asking past the end does no harm.
constexpr int64_t kPrefetch = 2048;
constexpr int64_t kRowChunk = 24;         // rows transformed together, so that T is read once
constexpr int64_t kUnpackSteps = 128;     // units unpacked at a time: 16 KB of weights in L1
constexpr int64_t kUnpackedBytes = kUnpackSteps * 2 * kUnit;

inline int64_t scratch_floats(const Problem& p) {
  const int64_t rows = p.M < kRowChunk ? p.M : kRowChunk;
  return rows * (p.padded + kBlock);
}

extern const Path kGeneric;

// Run one problem on `threads` threads (the caller is one of them).
void run(const Path& path, const Problem& problem, int threads);
void run(const Path& path, const Gated& problem, int threads);
void run(const Path& path, const Normalized& problem, int threads);
void run(const Path& path, const Rotated& problem, int threads);

// Row-major words of eight nibbles [N, ceil(K/8)] to panels and back; `padded` as in Problem.
void to_panels(const uint32_t* words, int64_t N, int64_t K, int64_t padded, int threads, uint8_t* panels);
void from_panels(const uint8_t* panels, int64_t N, int64_t K, int64_t padded, int threads, uint32_t* words);

}  // namespace w4a4
