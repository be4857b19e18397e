// Checks the native encoder with every kernel of a build that this CPU can run, on random weights: a sequence has the same
// bits alone, in a batch and on any threads, and every kernel agrees with the scalar one. Called by kernel_check.cpp.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "encoder.h"

using namespace hf_ternary;

namespace {

// No multiples of a vector.
constexpr std::int64_t kHidden = 60, kHeads = 5, kHeadDim = 12, kIntermediate = 100, kVocabulary = 50, kReach = 128;

struct Shape {
  const char* name;
  bool pre_norm;   // and gated, rotated, with a window; else post-norm, with biases by distance and token types
};

// The same weights for the same shape; what the encoder borrows lives as long as this.
class Model {
 public:
  Model(const Kernel& kernel, const Shape& shape) : random_(shape.pre_norm) {
    const std::int64_t up = (shape.pre_norm ? 2 : 1) * kIntermediate;
    const Table types = shape.pre_norm ? Table{} : Table{floats(2 * kHidden, 0.5f), nullptr, 2, 1, 32};
    const Table tokens{bytes(kVocabulary * kHidden / 2, 255), floats(kVocabulary * 2, 0.05f), kVocabulary, 2, 4};
    const Table positions{floats(kReach * kHidden, 0.5f), nullptr, kReach, 1, 32};
    const float* bias = shape.pre_norm ? nullptr : floats(kHeads * (2 * kReach + 1), 1.0f);
    encoder = std::make_unique<Encoder>(
        kernel, EncoderOptions{kHidden, kHeads, kIntermediate, shape.pre_norm ? Activation::silu : Activation::gelu,
                               shape.pre_norm, shape.pre_norm, 1e-6f, -1, tokens, positions, types, norm(),
                               shape.pre_norm ? norm() : NormSource{}, bias, kReach});
    for (int layer = 0; layer < 2; ++layer) {
      const std::int64_t reach = shape.pre_norm && layer == 0 ? 5 : kReach;
      encoder->add_layer({linear(3 * kHidden, kHidden), linear(kHidden, kHidden), linear(up, kHidden),
                          linear(kHidden, kIntermediate), norm(), norm(), {reach, reach},
                          shape.pre_norm ? floats(kReach * kHeadDim, 1.0f) : nullptr});
    }
  }

  std::unique_ptr<Encoder> encoder;

 private:
  const float* floats(std::int64_t n, float size) {
    std::uniform_real_distribution<float> uniform(0.1f * size, size);
    floats_.emplace_back();
    for (std::int64_t i = 0; i < n; ++i) floats_.back().push_back(uniform(random_));
    return floats_.back().data();
  }
  const std::uint8_t* bytes(std::int64_t n, int mask) {
    bytes_.emplace_back();
    for (std::int64_t i = 0; i < n; ++i) bytes_.back().push_back(static_cast<std::uint8_t>(random_() & mask));
    return bytes_.back().data();
  }
  NormSource norm() { return {floats(kHidden, 1.0f), floats(kHidden, 0.1f)}; }
  LinearSource linear(std::int64_t outputs, std::int64_t inputs) {
    bytes_.emplace_back();
    for (std::int64_t i = 0; i < outputs * inputs / 4; ++i) {
      int packed = 0;
      for (int field = 0; field < 4; ++field) packed |= static_cast<int>(1 + random_() % 3) << (2 * field);
      bytes_.back().push_back(static_cast<std::uint8_t>(packed));
    }
    const std::uint8_t* codes = bytes_.back().data();
    return {codes, floats(outputs, 0.1f), floats(outputs, 0.1f), outputs, inputs, 1};
  }

  std::mt19937 random_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<std::uint8_t>> bytes_;
};

using Rows = std::vector<std::vector<float>>;

// Hidden states of sequences of these lengths; a sequence's ids depend on its length only.
Rows hidden_states(const Encoder& encoder, const std::vector<std::int64_t>& lengths, int threads) {
  std::vector<std::vector<std::int64_t>> ids;
  std::vector<Sequence> sequences;
  Rows out;
  for (const std::int64_t length : lengths) {
    std::mt19937 random(static_cast<unsigned>(length));
    ids.emplace_back();
    for (std::int64_t i = 0; i < length; ++i) ids.back().push_back(random() % kVocabulary);
    out.emplace_back(length * kHidden, std::nanf(""));
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back({ids[i].data(), nullptr, nullptr, 0, lengths[i], out[i].data()});
    if (!encoder.fits(sequences.back())) out.clear();
  }
  if (!out.empty()) encoder.run(sequences, Pooling::none, false, threads);
  return out;
}

double cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) ab += double(a[i]) * b[i], aa += double(a[i]) * a[i], bb += double(b[i]) * b[i];
  return ab / std::sqrt(aa * bb);
}

}  // namespace

bool encoders_agree() {
  const std::vector<std::int64_t> lengths{1, 2, 15, 16, 17, 33, 100, 128, 7, 64};
  bool good = true;
  const auto expect = [&good](bool holds, const Kernel& kernel, const Shape& shape, const char* what, int length) {
    if (!holds) std::printf("%s: %s, %d tokens: %s\n", kernel.name, shape.name, length, what);
    good = good && holds;
  };
  for (const Shape& shape : {Shape{"post-norm", false}, Shape{"pre-norm", true}}) {
    Rows scalar;
    for (const Backend& backend : backends()) {
      if (std::string(backend.kernel->name) == "scalar") {
        scalar = hidden_states(*Model(*backend.kernel, shape).encoder, lengths, 1);
      }
    }
    for (const Backend& backend : backends()) {
      if (!backend.missing.empty()) continue;
      const Model model(*backend.kernel, shape);
      for (const int threads : {1, 3}) {
        const Rows batch = hidden_states(*model.encoder, lengths, threads);
        expect(batch.size() == lengths.size(), *backend.kernel, shape, "does not fit", 0);
        for (std::size_t i = 0; i < batch.size(); ++i) {
          const int length = static_cast<int>(lengths[i]);
          const Rows alone = hidden_states(*model.encoder, {lengths[i]}, threads);
          expect(batch[i] == alone[0], *backend.kernel, shape, "other bits alone than in a batch", length);  // a NaN is unequal
          expect(cosine(batch[i], scalar[i]) > 0.999, *backend.kernel, shape, "far from the scalar kernel", length);
        }
      }
    }
  }
  return good;
}
