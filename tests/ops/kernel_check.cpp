// Checks every kernel of a build that this CPU can run against plain loops, bit for bit. Needs no Python, so that a kernel
// for another architecture can be cross-compiled and run under an emulator. Prints the names of the kernels it checked.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "dispatch.h"
#include "linear.h"

using namespace hf_ternary;

namespace {

struct Layer {
  std::int64_t outputs, inputs, groups;
  std::vector<int> values;             // [outputs][inputs] in {-1, 0, 1}
  std::vector<std::uint8_t> canonical;  // [outputs][ceil(inputs / 4)]
  std::vector<float> scale, bias;
};

Layer random_layer(std::mt19937& random, std::int64_t outputs, std::int64_t inputs, std::int64_t groups) {
  Layer layer{outputs, inputs, groups, {}, {}, {}, {}};
  const std::int64_t row_bytes = (inputs + 3) / 4;
  layer.canonical.assign(outputs * row_bytes, 0b10101010);
  for (std::int64_t n = 0; n < outputs; ++n) {
    for (std::int64_t k = 0; k < inputs; ++k) {
      const int value = static_cast<int>(random() % 3) - 1;
      layer.values.push_back(value);
      layer.canonical[n * row_bytes + k / 4] ^= static_cast<std::uint8_t>((2 ^ (value + 2)) << (k % 4 * 2));
    }
  }
  std::uniform_real_distribution<float> uniform(0.01f, 1.0f);
  for (std::int64_t i = 0; i < outputs * groups; ++i) layer.scale.push_back(uniform(random));
  for (std::int64_t i = 0; i < outputs; ++i) layer.bias.push_back(uniform(random) - 0.5f);
  return layer;
}

// One row, as ops/reference.py says.
void reference(const Layer& layer, const float* x, bool bias, float* y) {
  float absmax = 0;
  bool finite = true;
  for (std::int64_t k = 0; k < layer.inputs; ++k) {
    finite = finite && std::isfinite(x[k]);
    absmax = std::fmax(absmax, std::fabs(x[k]));
  }
  const bool zero = absmax < 0x1p-100f;
  const float inverse = zero ? 0.0f : 127.0f / absmax;
  const float row_scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : absmax / 127.0f;
  const std::int64_t size = layer.inputs / layer.groups;
  for (std::int64_t n = 0; n < layer.outputs; ++n) {
    float total = 0;
    for (std::int64_t g = 0; g < layer.groups; ++g) {
      std::int32_t sum = 0;
      for (std::int64_t k = g * size; k < (g + 1) * size && finite; ++k) {
        sum += layer.values[n * layer.inputs + k] * static_cast<int>(std::nearbyint(x[k] * inverse));
      }
      const float part = static_cast<float>(sum) * layer.scale[n * layer.groups + g];
      total = g == 0 ? part : total + part;
    }
    y[n] = total * row_scale;
    if (bias) y[n] = y[n] + layer.bias[n];
  }
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The layer; or the kernel alone, unpacking every strip first, whatever this CPU prefers.
enum class How { linear, unpack, unpack_and_stream };

void multiply(const PackedWeight& weight, const float* x, std::int64_t rows, const Output& out) {
  WeightView view = weight.view();
  view.unpack_rows = 0;
  std::vector<std::int8_t> codes(rows * view.padded_inputs() + 1);
  std::vector<std::int32_t> twice_sum(rows * view.groups + 1);
  std::vector<float> scale(rows + 1);
  const QuantizedRows quantized{codes.data(), twice_sum.data(), scale.data()};
  AlignedBuffer<std::uint8_t> scratch(weight.kernel().strip_width() * view.padded_inputs());
  weight.kernel().quantize(view, x, rows, quantized);
  weight.kernel().multiply(view, quantized, rows, 0, weight.strips(), out, scratch.data());
}

bool check(const Kernel& kernel, std::mt19937& random, std::int64_t rows, std::int64_t outputs, std::int64_t inputs,
           std::int64_t groups, int threads, How how = How::linear) {
  const Layer layer = random_layer(random, outputs, inputs, groups);
  const PackedWeight weight(kernel, layer.canonical.data(), layer.scale.data(), outputs, inputs, groups);
  std::normal_distribution<float> normal;
  std::vector<float> x;
  for (std::int64_t i = 0; i < rows * inputs; ++i) x.push_back(normal(random));
  if (rows > 2) {
    x[0] = std::numeric_limits<float>::infinity();
    x[inputs + inputs / 2] = std::numeric_limits<float>::quiet_NaN();
    for (std::int64_t k = 0; k < inputs; ++k) x[2 * inputs + k] *= 1e-36f;
  }
  const bool bias = rows % 2 == 1;
  const float poison = std::numeric_limits<float>::quiet_NaN(), guard = -7.0f;
  std::vector<float> y(rows * outputs + 1, poison), expected(outputs);
  y.back() = guard;
  const float* given = bias ? layer.bias.data() : nullptr;
  if (how == How::linear) {
    linear(weight, x.data(), rows, given, y.data(), threads);
  } else {
    multiply(weight, x.data(), rows, {y.data(), given, how == How::unpack_and_stream});
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    reference(layer, x.data() + r * inputs, bias, expected.data());
    for (std::int64_t n = 0; n < outputs; ++n) {
      if (same(y[r * outputs + n], expected[n])) continue;
      std::printf("%s: rows=%d outputs=%d inputs=%d groups=%d threads=%d: y[%d, %d] = %.9g, expected %.9g\n", kernel.name,
                  int(rows), int(outputs), int(inputs), int(groups), threads, int(r), int(n), y[r * outputs + n], expected[n]);
      return false;
    }
  }
  if (y.back() != guard) std::printf("%s: wrote past the end of y\n", kernel.name);
  return y.back() == guard;
}

// Attention of a query that gives one key the weight 1 - tail and all others together `tail`, each less than a step of the
// probabilities: the other keys' values are (1, 0), that one's (0, 1).
bool check_tail(const Kernel& kernel, float tail) {
  constexpr std::int64_t kTokens = 8192, kDim = 16;
  std::vector<float> qkv(kTokens * 3 * kDim), key_scale(kTokens), value_scale(kTokens), query_scale(kTokens), y(kDim);
  for (std::int64_t t = 0; t < kTokens; ++t) qkv[(3 * t + 2) * kDim + (t == 0)] = 1.0f;
  qkv[0] = qkv[kDim] = 2 * std::sqrt(std::log((1 - tail) / tail * (kTokens - 1)));  // scores are divided by sqrt(kDim)
  std::vector<std::int16_t> query(kTokens * kDim), key(kTokens * kDim), value(kTokens * kDim);
  const AttentionOperands operands{1, kDim, kDim, kTokens, kTokens, query.data(), query_scale.data(), key.data(),
                                   key_scale.data(), value.data(), value_scale.data(), nullptr, 0, {kTokens, kTokens}};
  AlignedBuffer<std::uint8_t> scratch(kernel.attention_scratch(kTokens));
  kernel.load_attention(qkv.data(), 0, kTokens, operands);
  kernel.attend(operands, 0, 1, y.data(), scratch.data());
  // Every key may be wrong by half a sixteenth of a step; 1 - tail is 32767 steps.
  const bool good = std::fabs(y[0] - tail) < kTokens / 32.0f / 32767 && std::fabs(y[1] - (1 - tail)) < 1e-3f;
  if (!good) std::printf("%s: keys that weigh %g together give %g, the other one %g\n", kernel.name, tail, y[0], y[1]);
  return good;
}

}  // namespace

bool activations_are_accurate();   // activation_check.cpp
bool encoders_agree();             // encoder_check.cpp

int main() {
  std::mt19937 random(1);
  bool good = activations_are_accurate();
  good = encoders_agree() && good;
  for (const Backend& backend : backends()) {
    if (!backend.missing.empty()) continue;
    for (const std::int64_t inputs : {1, 3, 16, 17, 63, 384, 385}) {
      for (const std::int64_t outputs : {1, 5, 17, 64}) {
        for (const std::int64_t rows : {0, 1, 2, 3, 7, 13, 25}) {
          for (const How how : {How::linear, How::unpack, How::unpack_and_stream}) {
            good = check(*backend.kernel, random, rows, outputs, inputs, 1, 1, how) && good;
          }
        }
        good = check(*backend.kernel, random, 5, outputs, inputs, inputs, 1) && good;
      }
    }
    for (const std::int64_t groups : {2, 6, 12, 96}) good = check(*backend.kernel, random, 9, 40, 384, groups, 1) && good;
    for (const std::int64_t rows : {3, 30, 130}) good = check(*backend.kernel, random, rows, 300, 12000 / rows, 1, 3) && good;
    good = check(*backend.kernel, random, 1100, 1024, 20, 1, 2) && good;  // larger than what is kept in the caches
    for (const float tail : {0.03f, 0.13f}) good = check_tail(*backend.kernel, tail) && good;
    std::printf("%s\n", backend.kernel->name);
  }
  return good ? 0 : 1;
}
