// Attention of one sequence, written once over an `Isa` (see tile.h); kernel.h shows the operands.
//
// How: both products are the same tile of int16 pairs: scores = query x key, output = probabilities x value. A few queries
// at a time: their scores, softmax and probabilities never leave the L1/L2 cache. A tile touches only panels with a key that
// one of its queries sees, and a query's softmax only its own of these: no neighbour shows in it.
// Why int16: 13 bits a query or key, 12 a value and 16 a probability keep scores within about 3e-4 of the largest one, far
// below the noise of the int8 activations around, and sums fit int32: 4095 * 4095 * 128 < 2**31 (wider heads get fewer bits),
// and probabilities are scaled so that they add up to at most 2**19 before they are rounded, times 2047.
// A long text has many probabilities below one step: rounded alike, they would all vanish or all grow to a step. Each key
// adds an offset of its own first, so that the right share of them is rounded up.
#pragma once

#include "rows.h"

namespace hf_ternary {
namespace {

constexpr float kValueLevels = 2047.0f, kProbabilitySum = 0x1p19f, kProbabilityLevels = 32767.0f;

// By key mod 16: (i + 1/2) / 16 - 1/2 for every i < 16, neighbours far apart. Below 1/2, so that a hidden key stays 0.
constexpr float kOffsets[16] = {-0.46875f, 0.03125f, -0.21875f, 0.28125f, -0.34375f, 0.15625f, -0.09375f, 0.40625f,
                                -0.40625f, 0.09375f, -0.15625f, 0.34375f, -0.28125f, 0.21875f, -0.03125f, 0.46875f};

inline float query_levels(std::int64_t head_dim) { return head_dim <= 128 ? 4095.0f : 1448.0f; }  // up to kWidestHead

// How a vector x[n] becomes int16 codes: codes * scale ~ x. NaN, and no codes but zeros, if it holds a NaN or an infinity.
struct Words {
  const float* x;
  std::int64_t n;
  float inverse, scale;
};

template <class Isa>
HF_TERNARY_INLINE Words quantize_words(const float* x, std::int64_t n, float levels) {
  auto top = Isa::zero();
  for (std::int64_t k = 0; k < n; k += Isa::kLanes) top = Isa::max_magnitude(top, load_some<Isa>(x + k, n - k));
  const std::int32_t bits = Isa::reduce_max(top);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof bits);
  if (bits >= 0x7f800000) return {x, 0, 0.0f, absmax - absmax};
  return {x, n, absmax >= 0x1p-100f ? levels / absmax : 0.0f, absmax / levels};
}

// The codes of columns k, k + 1, ...; zeros from n on.
template <class Isa>
HF_TERNARY_INLINE typename Isa::Ints codes(const Words& words, std::int64_t k) {
  if (k >= words.n) return Isa::zero();
  return Isa::round(Isa::mul(load_some<Isa>(words.x + k, words.n - k), Isa::fill(words.inverse)));
}

// Head by head, for the tokens of one panel together: threads that fill other lanes of the same panel get hold of each of its
// cache lines once, not once a token.
template <class Isa>
void load_attention(const float* qkv, std::int64_t first, std::int64_t rows, const AttentionOperands& out) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  const std::int64_t d = out.head_dim, dim = out.dim, width = out.heads * d, pairs = dim / 2;
  const float levels = query_levels(d), root = kLog2E / square_root(static_cast<float>(d));
  std::int16_t keys[kLanes][kWidestHead];
  Words values[kLanes];
  for (std::int64_t last = first + rows, count; first < last; first += count, qkv += count * 3 * width) {
    const std::int64_t panel = first / kLanes, lane = first % kLanes;
    count = last - first < kLanes - lane ? last - first : kLanes - lane;
    for (std::int64_t h = 0; h < out.heads; ++h) {
      const float* x = qkv + h * d;
      for (std::int64_t t = 0; t < count; ++t, x += 3 * width) {
        const std::int64_t token = h * out.tokens + first + t, padded = h * out.padded + first + t;
        const Words query = quantize_words<Isa>(x, d, levels), key = quantize_words<Isa>(x + width, d, levels);
        values[t] = quantize_words<Isa>(x + 2 * width, d, kValueLevels);
        out.query_scale[token] = root * query.scale;
        out.key_scale[padded] = key.scale;
        out.value_scale[padded] = values[t].scale;
        for (std::int64_t k = 0; k < dim; k += kLanes) {
          Isa::store_words(out.query + token * dim + k, codes<Isa>(query, k));
          Isa::store_words(keys[t] + k, codes<Isa>(key, k));
        }
      }
      std::int16_t* key = out.key + ((h * (out.padded / kLanes) + panel) * pairs * kLanes + lane) * 2;
      for (std::int64_t p = 0; p < pairs; ++p, key += kLanes * 2) {
        for (std::int64_t t = 0; t < count; ++t) std::memcpy(key + 2 * t, keys[t] + 2 * p, 4);
      }
      std::int16_t* value = out.value + h * dim * out.padded;
      for (std::int64_t k = 0; k < dim; k += kLanes, value += out.padded * kLanes) {
        for (std::int64_t t = 0, step; t < count; t += step) {
          std::int16_t* to = value + (first + t) / 2 * kLanes * 2;
          const std::int64_t odd = (first + t) % 2;
          step = odd || t + 1 == count ? 1 : 2;
          if (step == 2) {
            Isa::store_ints(to, Isa::join_words(codes<Isa>(values[t], k), codes<Isa>(values[t + 1], k)));
            continue;
          }
          std::int16_t half[kLanes];  // of a pair whose other half may be another thread's
          Isa::store_words(half, codes<Isa>(values[t], k));
          for (std::int64_t i = 0; i < kLanes; ++i) to[2 * i + odd] = half[i];
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

// Scores of kRows queries with kPanels panels of keys, but for the scale of the query.
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
      Isa::store(scores + r * o.padded + key + p * Isa::kLanes, Isa::mul(Isa::to_floats(sum[r][p]), key_scale));
    }
  }
}

// One query's way from scores to probabilities. A step ends with sums over lanes, which take long: all queries of a tile take
// it, one after the other, before the first one takes the next.
struct Softmax {
  std::int64_t first, last;      // the keys that it sees
  std::int64_t begin, end;       // of the panels with such a key
  float slope, highest;          // of a score to an exponent of 2; the largest score
  float total, weighted, peak;   // sum of the powers; sum and maximum of these times the scales of the values
};

// Adds the biases and hides the keys that the query does not see.
template <class Isa>
HF_TERNARY_INLINE void find_highest(const AttentionOperands& o, std::int64_t head, std::int64_t query, float* scores,
                                    Softmax& s) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  s.first = o.first_key(query), s.last = o.end_key(query);
  s.begin = s.first - s.first % kLanes, s.end = (s.last + kLanes - 1) / kLanes * kLanes;
  s.slope = o.query_scale[head * o.tokens + query];
  if (o.bias) {
    const float* bias = o.bias + head * (2 * o.bias_reach + 1) + o.bias_reach - query;
    for (std::int64_t j = s.begin; j < s.last; j += kLanes) {
      const auto score = Isa::mul(Isa::load_floats(scores + j), Isa::fill(s.slope));
      Isa::store(scores + j, Isa::add(score, load_some<Isa>(bias + j, o.tokens - j)));
    }
    s.slope = 1.0f;
  } else if (s.slope < 0x1p-60f) {  // a query of zeros: hidden keys stay far below the others
    s.slope = 0x1p-60f;
  }
  for (std::int64_t j = s.begin; j < s.first; ++j) scores[j] = -1e30f;
  for (std::int64_t j = s.last; j < s.end; ++j) scores[j] = -1e30f;
  auto top = Isa::load_floats(scores + s.begin);
  for (std::int64_t j = s.begin + kLanes; j < s.end; j += kLanes) top = Isa::max(Isa::load_floats(scores + j), top);
  s.highest = Isa::reduce_max(top);
}

// scores -> 2**(slope * (score - highest)), the exponentials of the softmax, times the scale of the value.
template <class Isa>
HF_TERNARY_INLINE void exponentiate(const AttentionOperands& o, std::int64_t head, float* scores, Softmax& s) {
  const auto slope = Isa::fill(s.slope), shift = Isa::fill(-s.slope * s.highest), lowest = Isa::fill(-126.0f);
  auto total = Isa::fill(0.0f), weighted = total, peak = total;
  for (std::int64_t j = s.begin; j < s.end; j += Isa::kLanes) {
    const auto exponent = Isa::mul_add(Isa::load_floats(scores + j), slope, shift);
    const auto power = power_of_2<Isa>(Isa::max(lowest, exponent));  // of a NaN the second operand, which is returned
    const auto weight = Isa::mul(power, Isa::load_floats(o.value_scale + head * o.padded + j));
    Isa::store(scores + j, weight);
    total = Isa::add(total, power);
    weighted = Isa::add(weighted, weight);
    peak = Isa::max(peak, weight);
  }
  s.total = Isa::reduce_add(total), s.weighted = Isa::reduce_add(weighted), s.peak = Isa::reduce_max(peak);
}

// Writes the probabilities times the scales of the values, in int16, zero for the other keys in [tile_begin, tile_end);
// returns what undoes their scale.
template <class Isa>
HF_TERNARY_INLINE float store_probabilities(const float* scores, const Softmax& s, std::int64_t tile_begin,
                                            std::int64_t tile_end, std::int16_t* probabilities) {
  constexpr std::int64_t kLanes = Isa::kLanes;
  for (std::int64_t j = tile_begin; j < s.begin; ++j) probabilities[j] = 0;
  for (std::int64_t j = s.end; j < tile_end; ++j) probabilities[j] = 0;
  const bool finite = s.weighted < 3e38f;  // else there is a NaN among the queries, keys or values
  if (!finite || s.peak < 0x1p-100f) {     // or all values are zero
    std::memset(probabilities + s.begin, 0, (s.end - s.begin) * sizeof(std::int16_t));
    return finite ? 0.0f : s.weighted - s.weighted;
  }
  const float by_peak = kProbabilityLevels / s.peak, by_sum = kProbabilitySum / s.weighted;
  const float scale = by_peak < by_sum ? by_peak : by_sum;
  for (std::int64_t j = s.begin; j < s.end; j += kLanes) {
    const auto code = Isa::mul(Isa::load_floats(scores + j), Isa::fill(scale));
    Isa::store_words(probabilities + j, Isa::round(Isa::add(code, Isa::load_floats(kOffsets + (j & (16 - kLanes))))));
  }
  return 1.0f / (scale * s.total);
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
  Softmax softmax[kRows];
  float scale[kRows];
  for (int r = 0; r < kRows; ++r) find_highest<Isa>(o, head, query + r, scores + r * o.padded, softmax[r]);
  for (int r = 0; r < kRows; ++r) exponentiate<Isa>(o, head, scores + r * o.padded, softmax[r]);
  for (int r = 0; r < kRows; ++r) {
    scale[r] = store_probabilities<Isa>(scores + r * o.padded, softmax[r], begin, end, probabilities + r * o.padded);
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
