// The loops around an instruction set's inner kernels.  Included once by each path's file, inside
// an unnamed namespace, so that no code compiled for one instruction set is shared with another.
//
// An `Isa` provides
//   kRows                                  rows of a multiplication tile
//   transform(rows, x, ldx, T, y, ldy)     y[r, :] = x[r, 0:64] T (bfloat16), rows <= kTransformRows
//   abs_max(y, n)                          largest magnitude
//   quantize(y, n, inverse, low, high, q)  clamp, then round halves to even
//   unpack(units, steps, out)              nibbles to bytes, in the order its tile reads them
//   tile<rows, unpacked>(a, lda, w, steps, widen, acc)   acc[r, 32] += products over 4 steps inputs,
//                                          widening narrow sums at least every `widen` steps
//   finish(acc, ws, s, bias, out, n)       epilogue of one row of a panel from integers ...
//   finish(sum, s, bias, out, n)           ... and from group sums
//   fold(acc, ws, sum, first)              sum[32] (+)= float(acc) * ws
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Transform rows [m0, m1) block by block into y [m1 - m0, ldy].
template <class Isa>
static void transform_rows(const Problem& p, int64_t m0, int64_t m1, float* y, int64_t ldy) {
  const int64_t blocks = (p.K + kBlock - 1) / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint16_t* T = p.transform + b * kBlock * kBlock;
    const int64_t width = least(kBlock, p.K - b * kBlock);
    for (int64_t m = m0; m < m1; m += Isa::kTransformRows) {
      const int64_t rows = least(Isa::kTransformRows, m1 - m);
      const float* x = p.x + m * p.ldx + b * kBlock;
      float* target = y + (m - m0) * ldy + b * kBlock;
      if (width == kBlock) {
        Isa::transform(rows, x, p.ldx, T, target, ldy);
        continue;
      }
      float tail[Isa::kTransformRows * kBlock] = {};  // the last block, filled up with zeros
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < width; ++k) tail[r * kBlock + k] = x[r * p.ldx + k];
      Isa::transform(rows, tail, kBlock, T, target, ldy);
    }
  }
}

template <class Isa>
static void quantize_rows(const Problem& p, int64_t m0, int64_t m1, float* scratch) {
  float* y = scratch;
  const int64_t ldy = p.padded + kBlock;  // not a power of two, so that rows do not share cache sets
  const int64_t width = p.transform ? (p.K + kBlock - 1) / kBlock * kBlock : p.K;
  for (int64_t c = m0; c < m1; c += kRowChunk) {
    const int64_t end = least(c + kRowChunk, m1);
    if (p.transform) transform_rows<Isa>(p, c, end, y, ldy);
    for (int64_t m = c; m < end; ++m) {
      float* own = y + (m - c) * ldy;
      const float* row = p.transform ? own : p.x + m * p.ldx;
      if (p.offset) {
        for (int64_t k = 0; k < width; ++k) own[k] = row[k] - p.offset[k];
        row = own;
      }
      float scale;
      if (p.static_scale) {
        scale = *p.static_scale;
      } else {
        scale = Isa::abs_max(row, width) / static_cast<float>(p.high) * p.clip;
        if (!(scale > 0.0f)) scale = 1.0f;
      }
      p.row_scale[m] = scale;
      int8_t* q = p.q + m * p.ldq;
      Isa::quantize(row, width, 1.0f / scale, static_cast<float>(p.low), static_cast<float>(p.high), q);
      for (int64_t k = width; k < p.padded; ++k) q[k] = 0;
      for (int64_t g = 0; g < p.groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * p.group; k < (g + 1) * p.group; ++k) sum += q[k];
        p.start[m * p.groups + g] = -8 * sum;
      }
    }
  }
}

template <class Isa, bool kUnpacked, int kMaxRows = Isa::kRows>
static inline void tile_of(int64_t rows, const int8_t* a, int64_t lda, const uint8_t* w, int64_t steps,
                           int64_t widen, int32_t* acc) {
  if constexpr (kMaxRows > 1) {
    if (rows < kMaxRows) return tile_of<Isa, kUnpacked, kMaxRows - 1>(rows, a, lda, w, steps, widen, acc);
  }
  Isa::template tile<kMaxRows, kUnpacked>(a, lda, w, steps, widen, acc);
}

// acc [M, 32] += q[:, k0 : k0 + 4 steps] times those units of the panel.
template <class Isa>
static void accumulate(const Problem& p, const uint8_t* panel, int64_t k0, int64_t steps, int32_t* acc,
                       uint8_t* unpacked) {
  const int64_t tiles = (p.M + Isa::kRows - 1) / Isa::kRows;
  // A step adds a pair of products, each at most 15 * |low|, to an int16.
  const int64_t widen = 32767 / (2 * 15 * -static_cast<int64_t>(p.low));
  for (int64_t s0 = 0; s0 < steps; s0 += kUnpackSteps) {
    const int64_t count = least(kUnpackSteps, steps - s0);
    const uint8_t* units = panel + (k0 / 4 + s0) * kUnit;
    // Unpacking into L1 pays as soon as three tiles read the same weights.
    if (tiles > 2) Isa::unpack(units, count, unpacked);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = t * p.M / tiles, r1 = (t + 1) * p.M / tiles;
      const int8_t* a = p.q + r0 * p.ldq + k0 + 4 * s0;
      if (tiles > 2) tile_of<Isa, true>(r1 - r0, a, p.ldq, unpacked, count, widen, acc + r0 * kPanel);
      else           tile_of<Isa, false>(r1 - r0, a, p.ldq, units, count, widen, acc + r0 * kPanel);
    }
  }
}

template <class Isa>
static void multiply_panels(const Problem& p, int64_t p0, int64_t p1, int32_t* acc, float* sums,
                            uint8_t* unpacked) {
  const int64_t stride = p.panels() * kPanel;
  for (int64_t panel = p0; panel < p1; ++panel) {
    const uint8_t* units = p.weight + panel * (p.padded / 4) * kUnit;
    const float* scale = p.weight_scale + panel * kPanel;
    const float* bias = p.bias ? p.bias + panel * kPanel : nullptr;
    const int64_t columns = least(kPanel, p.N - panel * kPanel);
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t m = 0; m < p.M; ++m) {
        const int32_t start = p.start[m * p.groups + g];
        for (int64_t n = 0; n < kPanel; ++n) acc[m * kPanel + n] = start;
      }
      accumulate<Isa>(p, units, g * p.group, p.group / 4, acc, unpacked);
      if (p.groups == 1) break;
      for (int64_t m = 0; m < p.M; ++m)
        Isa::fold(acc + m * kPanel, scale + g * stride, sums + m * kPanel, g == 0);
    }
    for (int64_t m = 0; m < p.M; ++m) {
      float* out = p.out + m * p.ldo + panel * kPanel;
      if (p.groups == 1) Isa::finish(acc + m * kPanel, scale, p.row_scale[m], bias, out, columns);
      else               Isa::finish(sums + m * kPanel, p.row_scale[m], bias, out, columns);
    }
  }
}
