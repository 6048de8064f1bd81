// The loops of elementwise.h on vectors of 16 floats, which the compiler makes of whatever registers
// there are.  Included once by each path's file, inside an unnamed namespace, like driver.h.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

static inline void load_whole(Floats& v, const float* p) { __builtin_memcpy(&v, p, sizeof v); }

// What is left of a row goes through memory, so that whole vectors can stay in registers.
static inline void load(Floats& v, const float* p, int64_t count) {
  if (count >= kLanes) return load_whole(v, p);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  load_whole(v, lanes);
}

static inline void store(float* p, const Floats& v, int64_t count) {
  if (count >= kLanes) {
    __builtin_memcpy(p, &v, sizeof v);
    return;
  }
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// v = e^t; infinite from 88.7 on, at least 2^-126 everywhere.  What is not a number stays so.
static inline void exponential(Floats& v, const Floats& given) {
  const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 89.0f;
  Floats t = given < lowest ? lowest : given;
  t = t > highest ? highest : t;
  // Added to 1.5 * 2^23, a number is rounded to an integer, which is then in the lowest bits.
  const Floats shifted = t * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers power = ((Integers)shifted << 23) + (127 << 23);
  v = p * (Floats)power;
}

static void gate_rows(const Gated& g, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t n = 0; n < g.N; n += kLanes) {
      const int64_t count = g.N - n;
      Floats a, e;
      load(a, g.gate + m * g.ldg + n, count);
      exponential(e, g.silu ? -a : (a + a * a * a * 0.044715f) * -1.5957691216f);
      Floats y = a / (e + 1.0f);
      if (g.up) {
        Floats b;
        load(b, g.up + m * g.ldu + n, count);
        y *= b;
      }
      store(g.out + m * g.N + n, y, count);
    }
}

// The sum of 16 lanes, in pairs.
static inline float total(const Floats& v) {
  float s[kLanes];
  __builtin_memcpy(s, &v, sizeof s);
  for (int64_t width = kLanes / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// The rows m to m + R - 1.  A sum waits for the one before it, so several rows are summed in turns;
// lanes behind the last column are 0 in every sum.
template <int R>
static void normalize_together(const Normalized& z, int64_t m) {
  const auto length = static_cast<float>(z.N);
  const int64_t whole = z.N / kLanes * kLanes, rest = z.N - whole;
  Integers inside{};
  for (int64_t i = 0; i < rest; ++i) inside[i] = -1;
  const float* x[R];
  float mean[R] = {}, inverse[R];
  for (int r = 0; r < R; ++r) x[r] = z.x + (m + r) * z.ldx;
  if (z.centred) {
    Floats sums[R] = {};
    for (int64_t n = 0; n < whole; n += kLanes)
      for (int r = 0; r < R; ++r) {
        Floats v;
        load_whole(v, x[r] + n);
        sums[r] += v;
      }
    for (int r = 0; r < R && rest; ++r) {
      Floats v;
      load(v, x[r] + whole, rest);
      sums[r] += v;
    }
    for (int r = 0; r < R; ++r) mean[r] = total(sums[r]) / length;
  }
  Floats squares[R] = {};
  for (int64_t n = 0; n < whole; n += kLanes)
    for (int r = 0; r < R; ++r) {
      Floats v;
      load_whole(v, x[r] + n);
      v -= mean[r];
      squares[r] += v * v;
    }
  for (int r = 0; r < R && rest; ++r) {
    Floats v;
    load(v, x[r] + whole, rest);
    v -= mean[r];
    v = (Floats)((Integers)v & inside);
    squares[r] += v * v;
  }
  for (int r = 0; r < R; ++r)
    inverse[r] = 1.0f / __builtin_sqrtf(total(squares[r]) / length + z.eps);
  for (int r = 0; r < R; ++r) {
    const int64_t row = (m + r) / z.share * z.lds;
    for (int64_t n = 0; n < z.N; n += kLanes) {
      const int64_t count = z.N - n;
      Floats v, w;
      load(v, x[r] + n, count);
      v = (v - mean[r]) * inverse[r];
      if (z.scale) {
        load(w, z.scale + row + n, count);
        v *= w + z.base;
      }
      if (z.shift) {
        load(w, z.shift + row + n, count);
        v += w;
      }
      store(z.out + (m + r) * z.N + n, v, count);
    }
  }
}

static void normalize_rows(const Normalized& z, int64_t m0, int64_t m1) {
  int64_t m = m0;
  for (; m + 4 <= m1; m += 4) normalize_together<4>(z, m);
  for (; m < m1; ++m) normalize_together<1>(z, m);
}

// Rows are the tokens of all chunks, b * T + t.
static void rotate_rows(const Rotated& r, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; ++m) {
    const int64_t b = m / r.T, t = m % r.T;
    const float* cosine = r.cosine + b * r.table + t * r.half;
    const float* sine = r.sine + b * r.table + t * r.half;
    for (int64_t h = 0; h < r.H; ++h) {
      const float* x = r.x + b * r.xb + t * r.xt + h * r.xh;
      float* out = r.out + ((b * r.H + h) * r.T + t) * 2 * r.half;
      for (int64_t n = 0; n < r.half; n += kLanes) {
        const int64_t count = r.half - n;
        Floats u, v, c, s;
        load(u, x + n, count);
        load(v, x + r.half + n, count);
        load(c, cosine + n, count);
        load(s, sine + n, count);
        store(out + n, u * c - v * s, count);
        store(out + r.half + n, v * c + u * s, count);
      }
    }
  }
}
