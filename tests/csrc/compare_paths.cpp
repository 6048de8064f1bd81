// Every path this processor runs against plain C++, bit for bit, on random layers and what lies between.
//
// For processors that the Python tests do not run on: compiled with the kernels into a program of
// its own, it runs under an emulator.  Prints "<path> <layers>" for each path, or what differed.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "w4a4.h"

using w4a4::Path;
using w4a4::Problem;

namespace {

struct Layer {
  std::vector<float> x, scale, bias;
  std::vector<uint16_t> transform;
  std::vector<uint8_t> weight;
  float static_scale = 0.37f;
  Problem problem{};
};

Layer draw(std::mt19937& random) {
  const auto number = [&](int low, int high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::normal_distribution<float> normal;
  Layer layer;
  Problem& p = layer.problem;
  p.M = number(1, 20);
  p.N = number(1, 70);
  p.K = number(1, 200);
  const bool grouped = number(0, 1), transformed = number(0, 1);
  const int64_t width = transformed ? (p.K + 63) / 64 * 64 : p.K;
  p.group = grouped ? 64 : 0;
  p.padded = (width + 63) / 64 * 64;
  p.groups = grouped ? (width + 63) / 64 : 1;
  if (!grouped) p.group = p.padded;
  p.high = number(0, 3) ? 7 : 127;
  p.low = -p.high - 1;
  layer.x.resize(p.M * p.K);
  for (auto& v : layer.x) v = normal(random);
  layer.weight.resize(p.panels() * p.padded / 4 * w4a4::kUnit);
  for (auto& v : layer.weight) v = static_cast<uint8_t>(number(0, 255));
  layer.scale.resize(p.groups * p.panels() * w4a4::kPanel);
  for (auto& v : layer.scale) v = 0.1f + std::abs(normal(random));
  layer.bias.resize(p.panels() * w4a4::kPanel);
  for (auto& v : layer.bias) v = normal(random);
  if (transformed) {
    layer.transform.resize(p.padded * 64);
    for (auto& v : layer.transform) {
      const float f = normal(random) / 8;
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      v = static_cast<uint16_t>(bits >> 16);
    }
  }
  p.ldx = p.K;
  p.ldo = p.N;
  return layer;
}

std::vector<float> result(const Path& path, Layer& layer, bool is_static, bool biased, int threads) {
  Problem p = layer.problem;
  std::vector<float> out(p.M * p.N, -1.0f);
  p.x = layer.x.data();
  p.transform = layer.transform.empty() ? nullptr : layer.transform.data();
  p.static_scale = is_static ? &layer.static_scale : nullptr;
  p.weight = layer.weight.data();
  p.weight_scale = layer.scale.data();
  p.bias = biased ? layer.bias.data() : nullptr;
  p.out = out.data();
  w4a4::run(path, p, threads);
  return out;
}

// Rows of an odd length with gaps, some of them modulated together.
bool elementwise_differs(const Path& path, std::mt19937& random) {
  const auto number = [&](int low, int high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::normal_distribution<float> normal(0.0f, 8.0f);
  const int64_t share = number(1, 3), M = share * number(1, 4), N = number(1, 90), gap = number(0, 5);
  std::vector<float> x(M * (N + gap)), y(x.size()), wanted(M * N, -1.0f), found(M * N, -2.0f);
  for (auto& v : x) v = normal(random);
  for (auto& v : y) v = normal(random);
  const auto differs = [&] { return std::memcmp(wanted.data(), found.data(), M * N * 4) != 0; };

  w4a4::Gated g{x.data(), N + gap, number(0, 1) ? y.data() : nullptr, N + gap, wanted.data(), M, N, number(0, 1) == 1};
  w4a4::run(w4a4::kGeneric, g, 1);
  g.out = found.data();
  w4a4::run(path, g, 2);
  if (differs()) return true;

  w4a4::Normalized z{};
  z.x = x.data();
  z.ldx = N + gap;
  z.scale = number(0, 2) ? y.data() : nullptr;
  z.shift = number(0, 2) ? y.data() + gap : nullptr;
  z.base = number(0, 1);
  z.lds = N;
  z.share = share;
  z.out = wanted.data();
  z.M = M;
  z.N = N;
  z.eps = 1e-6f;
  z.centred = number(0, 1) == 1;
  w4a4::run(w4a4::kGeneric, z, 1);
  z.out = found.data();
  w4a4::run(path, z, 2);
  if (differs()) return true;

  if (N % 2) return false;
  w4a4::Rotated r{x.data(), share * (N + gap), N + gap, 0, y.data(), y.data() + gap, 0, wanted.data(), M / share, share, 1, N / 2};
  w4a4::run(w4a4::kGeneric, r, 1);
  r.out = found.data();
  w4a4::run(path, r, 2);
  return differs();
}

}  // namespace

namespace w4a4 {
extern const Path W4A4_TESTED;
}  // namespace w4a4

int main() {
  const Path* paths[] = {&w4a4::W4A4_TESTED};
  for (const Path* path : paths) {
    if (!path->runs_here()) continue;
    std::mt19937 random(1);
    for (int trial = 0; trial < 5000; ++trial) {
      Layer layer = draw(random);
      const bool is_static = trial % 2, biased = trial % 3;
      const auto wanted = result(w4a4::kGeneric, layer, is_static, biased, 1);
      const auto found = result(*path, layer, is_static, biased, 1 + trial % 2);
      if (std::memcmp(wanted.data(), found.data(), wanted.size() * 4) != 0) {
        std::printf("%s differs in layer %d: M=%lld N=%lld K=%lld\n", path->name, trial,
                    static_cast<long long>(layer.problem.M), static_cast<long long>(layer.problem.N),
                    static_cast<long long>(layer.problem.K));
        return 1;
      }
      if (elementwise_differs(*path, random)) {
        std::printf("%s differs between linears in trial %d\n", path->name, trial);
        return 1;
      }
    }
    std::printf("%s 5000\n", path->name);
  }
  return 0;
}
