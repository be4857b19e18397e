// Attention of one sequence, written once over an `Isa` (see tile.h); kernel.h shows the operands.
//
// How: both products are the same tile of int16 pairs: scores = query x key, output = probabilities x value. A few queries
// at a time: their scores, softmax and probabilities never leave the L1/L2 cache. A tile touches only panels with a key that
// one of its queries sees, and a query's softmax only its own of these: no neighbour shows in it.
// Why int16: 13 bits a query or key, 12 a value and 16 a probability keep scores within 2e-4 of float32's, far below the
// noise of the int8 activations around, and sums fit int32: 4095 * 4095 * 128 < 2**31 (wider heads get fewer bits), and
// probabilities are scaled so that they add up to at most 2**19, times 2047.
#pragma once

#include "rows.h"

namespace hf_ternary {
namespace {

constexpr float kValueLevels = 2047.0f, kProbabilitySum = 0x1p19f, kProbabilityLevels = 32767.0f;

inline float query_levels(std::int64_t head_dim) { return head_dim <= 128 ? 4095.0f : 1448.0f; }  // up to 1024 columns

// x[n] -> codes [dim], zeros from n on; returns the scale: codes * scale ~ x. NaN if x holds a NaN or an infinity.
template <class Isa>
HF_TERNARY_INLINE float quantize_words(const float* x, std::int64_t n, float levels, std::int64_t dim, std::int16_t* codes) {
  auto top = Isa::zero();
  for (std::int64_t k = 0; k < n; k += Isa::kLanes) top = Isa::max_magnitude(top, load_some<Isa>(x + k, n - k));
  const std::int32_t bits = Isa::reduce_max(top);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof bits);
  const bool finite = bits < 0x7f800000;
  const auto inverse = Isa::fill(finite && absmax >= 0x1p-100f ? levels / absmax : 0.0f);
  for (std::int64_t k = 0; k < dim; k += Isa::kLanes) {
    const auto v = k < n && finite ? load_some<Isa>(x + k, n - k) : Isa::fill(0.0f);
    Isa::store_words(codes + k, Isa::round(Isa::mul(v, inverse)));
  }
  return finite ? absmax / levels : absmax - absmax;
}

// Head by head, for the tokens of one panel together: threads that fill other lanes of the same panel get hold of each of its
// cache lines once, not once a token.
template <class Isa>
void load_attention(const float* qkv, std::int64_t first, std::int64_t rows, const AttentionOperands& out) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  const std::int64_t d = out.head_dim, dim = out.dim, width = out.heads * d, pairs = dim / 2;
  const float levels = query_levels(d), root = 1.0f / square_root(static_cast<float>(d));
  std::int16_t codes[kLanes][1024];
  for (std::int64_t last = first + rows, count; first < last; first += count, qkv += count * 3 * width) {
    const std::int64_t panel = first / kLanes, lane = first % kLanes;
    count = last - first < kLanes - lane ? last - first : kLanes - lane;
    for (std::int64_t h = 0; h < out.heads; ++h) {
      const float* x = qkv + h * d;
      for (std::int64_t t = 0; t < count; ++t, x += 3 * width) {
        const std::int64_t token = h * out.tokens + first + t;
        out.query_scale[token] = root * quantize_words<Isa>(x, d, levels, dim, out.query + token * dim);
        out.key_scale[h * out.padded + first + t] = quantize_words<Isa>(x + width, d, levels, dim, codes[t]);
      }
      std::int16_t* key = out.key + ((h * (out.padded / kLanes) + panel) * pairs * kLanes + lane) * 2;
      for (std::int64_t p = 0; p < pairs; ++p, key += kLanes * 2) {
        for (std::int64_t t = 0; t < count; ++t) std::memcpy(key + 2 * t, codes[t] + 2 * p, 4);
      }
      x = qkv + 2 * width + h * d;
      for (std::int64_t t = 0; t < count; ++t, x += 3 * width) {
        out.value_scale[h * out.padded + first + t] = quantize_words<Isa>(x, d, kValueLevels, dim, codes[t]);
      }
      std::int16_t* value = out.value + h * dim * out.padded;
      for (std::int64_t k = 0; k < dim; k += kLanes, value += out.padded * kLanes) {
        for (std::int64_t t = 0; t < count; ++t) {
          std::int16_t* to = value + (first + t) / 2 * kLanes * 2 + (first + t) % 2;
          for (std::int64_t i = 0; i < kLanes; ++i) to[2 * i] = codes[t][k + i];
        }
      }
    }
  }
}

// sum[r][p] = a[r] . b[p] over `pairs` pairs: a [kRows][stride], b [kPanels] panels of [pairs][lanes][2].
template <class Isa, int kRows, int kPanels>
HF_TERNARY_INLINE void multiply_pairs(const std::int16_t* a, std::int64_t stride, const std::int16_t* b, std::int64_t panel,
                                      std::int64_t pairs, typename Isa::Ints (&sum)[kRows][kPanels]) {
  HF_TERNARY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_TERNARY_UNROLL
    for (int p = 0; p < kPanels; ++p) sum[r][p] = Isa::zero();
  }
  for (std::int64_t k = 0; k < pairs; ++k, a += 2, b += 2 * Isa::kLanes) {
    typename Isa::Ints column[kPanels];
    HF_TERNARY_UNROLL
    for (int p = 0; p < kPanels; ++p) column[p] = Isa::load_ints(b + p * panel);
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * stride, sizeof pair);
      const auto row = Isa::fill_int(pair);
      HF_TERNARY_UNROLL
      for (int p = 0; p < kPanels; ++p) sum[r][p] = Isa::dot_pairs(sum[r][p], column[p], row);
    }
  }
}

// Scores of kRows queries with kPanels panels of keys.
template <class Isa, int kRows, int kPanels>
HF_TERNARY_INLINE void score(const AttentionOperands& o, std::int64_t head, std::int64_t query, std::int64_t key,
                             float* scores) {
  typename Isa::Ints sum[kRows][kPanels];
  multiply_pairs<Isa, kRows, kPanels>(o.query + (head * o.tokens + query) * o.dim, o.dim,
                                      o.key + (head * o.padded + key) * o.dim, o.dim * Isa::kLanes, o.dim / 2, sum);
  HF_TERNARY_UNROLL
  for (int p = 0; p < kPanels; ++p) {
    const auto key_scale = Isa::load_floats(o.key_scale + head * o.padded + key + p * Isa::kLanes);
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto scale = Isa::mul(key_scale, Isa::fill(o.query_scale[head * o.tokens + query + r]));
      Isa::store(scores + r * o.padded + key + p * Isa::kLanes, Isa::mul(Isa::to_floats(sum[r][p]), scale));
    }
  }
}

// scores [padded] -> probabilities in int16, times the scales of the values, zero for the other keys in [tile_begin, tile_end);
// returns what undoes their scale.
template <class Isa>
HF_TERNARY_INLINE float softmax(const AttentionOperands& o, std::int64_t head, std::int64_t query, std::int64_t tile_begin,
                                std::int64_t tile_end, float* scores, std::int16_t* probabilities) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  const std::int64_t first = o.first_key(query), last = o.end_key(query);
  const std::int64_t begin = first - first % kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
  if (o.bias) {
    const float* bias = o.bias + head * (2 * o.bias_reach + 1) + o.bias_reach - query;
    for (std::int64_t j = begin; j < last; j += kLanes) {
      const auto biased = Isa::add(Isa::load_floats(scores + j), load_some<Isa>(bias + j, o.tokens - j));
      Isa::store(scores + j, biased);
    }
  }
  for (std::int64_t j = begin; j < first; ++j) scores[j] = -1e30f;
  for (std::int64_t j = last; j < end; ++j) scores[j] = -1e30f;
  auto top = Isa::load_floats(scores + begin);
  for (std::int64_t j = begin + kLanes; j < end; j += kLanes) top = Isa::max(Isa::load_floats(scores + j), top);
  const auto highest = Isa::fill(Isa::reduce_max(top));
  auto sum = Isa::fill(0.0f), weighted = sum, largest = sum;
  for (std::int64_t j = begin; j < end; j += kLanes) {
    const auto e = exponential<Isa>(Isa::sub(Isa::load_floats(scores + j), highest));
    const auto w = Isa::mul(e, Isa::load_floats(o.value_scale + head * o.padded + j));
    Isa::store(scores + j, w);
    sum = Isa::add(sum, e);
    weighted = Isa::add(weighted, w);
    largest = Isa::max(largest, w);
  }
  const float total = Isa::reduce_add(weighted), peak = Isa::reduce_max(largest);
  for (std::int64_t j = tile_begin; j < begin; ++j) probabilities[j] = 0;
  for (std::int64_t j = end; j < tile_end; ++j) probabilities[j] = 0;
  if (!(total < 3e38f)) {  // a NaN among the queries, keys or values
    std::memset(probabilities + begin, 0, (end - begin) * sizeof(std::int16_t));
    return total - total;
  }
  if (peak < 0x1p-100f) {  // all values are zero
    std::memset(probabilities + begin, 0, (end - begin) * sizeof(std::int16_t));
    return 0.0f;
  }
  const float by_peak = kProbabilityLevels / peak, by_sum = kProbabilitySum / total, scale = by_peak < by_sum ? by_peak : by_sum;
  for (std::int64_t j = begin; j < end; j += kLanes) {
    Isa::store_words(probabilities + j, Isa::round(Isa::mul(Isa::load_floats(scores + j), Isa::fill(scale))));
  }
  return 1.0f / (scale * Isa::reduce_add(sum));
}

// kPanels vectors of the output of kRows queries, from the keys [first, last).
template <class Isa, int kRows, int kPanels>
HF_TERNARY_INLINE void weigh(const AttentionOperands& o, std::int64_t head, std::int64_t column, std::int64_t first,
                             std::int64_t last, const std::int16_t* probabilities, const float* scale, float* y) {
  typename Isa::Ints sum[kRows][kPanels];
  const std::int64_t panel = o.padded * Isa::kLanes;
  const std::int16_t* values = o.value + head * o.dim * o.padded + column * o.padded + first * Isa::kLanes;
  multiply_pairs<Isa, kRows, kPanels>(probabilities + first, o.padded, values, panel, (last - first + 1) / 2, sum);
  HF_TERNARY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_TERNARY_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      const std::int64_t c = column + p * Isa::kLanes;
      const auto out = Isa::mul(Isa::to_floats(sum[r][p]), Isa::fill(scale[r]));
      if (c < o.head_dim) store_some<Isa>(y + r * o.heads * o.head_dim + head * o.head_dim + c, out, o.head_dim - c);
    }
  }
}

template <class Isa, int kRows>
void attend_tile(const AttentionOperands& o, std::int64_t head, std::int64_t query, float* y, float* scores,
                 std::int16_t* probabilities) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  const std::int64_t first = o.first_key(query), last = o.end_key(query + kRows - 1);
  const std::int64_t begin = first - first % kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
  std::int64_t key = begin;
  for (; key + 2 * kLanes <= end; key += 2 * kLanes) score<Isa, kRows, 2>(o, head, query, key, scores);
  if (key < end) score<Isa, kRows, 1>(o, head, query, key, scores);
  float scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    scale[r] = softmax<Isa>(o, head, query + r, begin, end, scores + r * o.padded, probabilities + r * o.padded);
  }
  std::int64_t column = 0;
  for (; column + 2 * kLanes <= o.dim; column += 2 * kLanes) {
    weigh<Isa, kRows, 2>(o, head, column, begin, last, probabilities, scale, y);
  }
  if (column < o.dim) weigh<Isa, kRows, 1>(o, head, column, begin, last, probabilities, scale, y);
}

template <class Isa, int kRows = Isa::kRows>
HF_TERNARY_INLINE void run_attend_tile(int rows, const AttentionOperands& o, std::int64_t head, std::int64_t query, float* y,
                                       float* scores, std::int16_t* probabilities) {
  if (rows == kRows) return attend_tile<Isa, kRows>(o, head, query, y, scores, probabilities);
  if constexpr (kRows > 1) run_attend_tile<Isa, kRows - 1>(rows, o, head, query, y, scores, probabilities);
}

template <class Isa>
void attend(const AttentionOperands& o, std::int64_t first, std::int64_t rows, float* y, std::uint8_t* scratch) {
  const std::int64_t tiles = (rows + Isa::kRows - 1) / Isa::kRows;
  float* scores = reinterpret_cast<float*>(scratch);
  std::int16_t* probabilities = reinterpret_cast<std::int16_t*>(scores + Isa::kRows * o.padded);
  for (std::int64_t head = 0; head < o.heads; ++head) {
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
      run_attend_tile<Isa>(static_cast<int>(end - begin), o, head, first + begin, y + begin * o.heads * o.head_dim, scores,
                           probabilities);
    }
  }
}

template <class Isa>
constexpr Kernel make_kernel(const char* name) {
  return {name,          Isa::kLanes,    Isa::kPanels,  Isa::kRows,  quantize<Isa>,
          multiply<Isa>, normalize<Isa>, activate<Isa>, rotate<Isa>, load_attention<Isa>, attend<Isa>};
}

}  // namespace
}  // namespace hf_ternary
