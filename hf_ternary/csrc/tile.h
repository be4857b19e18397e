// The kernel, written once over an `Isa`: the handful of vector operations that a kernel_*.cpp file supplies.
//
// How: a tile holds kRows x kPanels accumulators in registers and walks along the columns. Stored codes are {1, 2, 3} =
// value + 2, unsigned, which is what the x86 dot products (u8 x s8) want; the offset is undone by subtracting twice the
// sum of the activations. All sums are integers and exact, so the order of rows, tiles and threads never shows.
// Why two ways to read weights: few rows unpack the 2-bit codes in registers, since memory is what they wait for; with many
// rows it can pay to unpack a strip once to bytes in the L1/L2 cache and spend every instruction on dot products.
// Floats: sum_g float(acc_g) * weight_scale_g, then * row scale, then + bias, each rounded (this file's users are compiled
// without contraction to FMA): bit for bit what ops/reference.py computes.
//
// An Isa provides
//   kLanes, kPanels, kRows   geometry (see Kernel)
//   kChunkBlocks             blocks after which a Partial must be widened (it would overflow)
//   Bytes, Row, Partial, Ints, Floats   vectors; Ints are kLanes int32
//   and the functions used below.
//
// Everything is in an unnamed namespace: each kernel file compiles its own copy under its own flags, and no copy with, say,
// AVX-512 instructions can be the one that the linker keeps for the others. For the same reason no inline function of the
// standard library is used.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define HF_TERNARY_INLINE __forceinline
#define HF_TERNARY_UNROLL
#define HF_TERNARY_PREFETCH(address)
#else
#define HF_TERNARY_PREFETCH(address) __builtin_prefetch(address, 1)
#define HF_TERNARY_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define HF_TERNARY_UNROLL _Pragma("unroll")
#else
#define HF_TERNARY_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace hf_ternary {
namespace {

// Independent accumulators for one output: a tile of few rows would otherwise wait for its own last dot product.
template <class Isa>
constexpr int chains(int rows) {
  constexpr int budget = Isa::kRows * Isa::kPanels;
  return rows * Isa::kPanels * 4 <= budget ? 4 : rows * Isa::kPanels * 2 <= budget ? 2 : 1;
}

template <class Isa, int kRows, bool kUnpacked, int kField>
HF_TERNARY_INLINE void dot_field(typename Isa::Partial (&sum)[chains<Isa>(kRows)][kRows][Isa::kPanels],
                                 const typename Isa::Bytes (&packed)[Isa::kPanels], const std::uint8_t* codes,
                                 const typename Isa::Row (&row)[kRows]) {
  constexpr int kVector = Isa::kLanes * 4;
  typename Isa::Bytes weight[Isa::kPanels];
  HF_TERNARY_UNROLL
  for (int p = 0; p < Isa::kPanels; ++p) {
    if constexpr (kUnpacked) {
      weight[p] = Isa::load(codes + (kField * Isa::kPanels + p) * kVector);
    } else {
      weight[p] = Isa::template field<kField>(packed[p]);
    }
  }
  auto& chain = sum[kField % chains<Isa>(kRows)];
  HF_TERNARY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_TERNARY_UNROLL
    for (int p = 0; p < Isa::kPanels; ++p) chain[r][p] = Isa::template dot<kField>(chain[r][p], weight[p], row[r]);
  }
}

// Adds the dot products of `blocks` blocks to `total`; kChunkBlocks allows a narrow Partial to hold them.
template <class Isa, int kRows, bool kUnpacked>
HF_TERNARY_INLINE void dot_blocks(typename Isa::Ints (&total)[kRows][Isa::kPanels], const std::uint8_t* codes,
                                  const std::int8_t* x, std::int64_t stride, std::int64_t blocks) {
  constexpr int kChains = chains<Isa>(kRows);
  constexpr std::int64_t kBlockBytes = Isa::kPanels * Isa::kLanes * (kUnpacked ? 16 : 4);
  typename Isa::Partial sum[kChains][kRows][Isa::kPanels];
  HF_TERNARY_UNROLL
  for (int c = 0; c < kChains; ++c) {
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HF_TERNARY_UNROLL
      for (int p = 0; p < Isa::kPanels; ++p) sum[c][r][p] = Isa::zero_partial();
    }
  }
  for (std::int64_t b = 0; b < blocks; ++b, codes += kBlockBytes, x += kBlock) {
    typename Isa::Bytes packed[Isa::kPanels];
    if constexpr (!kUnpacked) {
      HF_TERNARY_UNROLL
      for (int p = 0; p < Isa::kPanels; ++p) packed[p] = Isa::load(codes + p * Isa::kLanes * 4);
    }
    typename Isa::Row row[kRows];
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) row[r] = Isa::row(x + r * stride);
    dot_field<Isa, kRows, kUnpacked, 0>(sum, packed, codes, row);
    dot_field<Isa, kRows, kUnpacked, 1>(sum, packed, codes, row);
    dot_field<Isa, kRows, kUnpacked, 2>(sum, packed, codes, row);
    dot_field<Isa, kRows, kUnpacked, 3>(sum, packed, codes, row);
  }
  HF_TERNARY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_TERNARY_UNROLL
    for (int p = 0; p < Isa::kPanels; ++p) {
      typename Isa::Partial all = sum[0][r][p];
      HF_TERNARY_UNROLL
      for (int c = 1; c < kChains; ++c) all = Isa::add_partial(all, sum[c][r][p]);
      total[r][p] = Isa::widen_add(total[r][p], all);
    }
  }
}

// One strip of outputs for kRows rows: what a tile reads and where it writes.
struct TileArgs {
  const std::uint8_t* codes;         // of the strip, packed or unpacked
  const float* weight_scale;         // [groups][strip width]
  std::int64_t groups, group_blocks;
  const std::int8_t* x;              // [kRows][stride]
  std::int64_t stride;               // padded inputs
  const std::int32_t* twice_sum;     // [kRows][groups]
  const float* row_scale;            // [kRows]
  const float* bias;                 // [strip width] or null
  float* y;                          // [kRows][y_stride]
  std::int64_t y_stride;
  std::int64_t width;                // outputs that exist
  bool stream;
};

template <class Isa, int kRows, bool kUnpacked>
void tile(const TileArgs& a) {
  constexpr int kLanes = Isa::kLanes, kPanels = Isa::kPanels, kWidth = kLanes * kPanels;
  constexpr std::int64_t kBlockBytes = kWidth * (kUnpacked ? 16 : 4);
  if (!a.stream) {  // have the lines of y at hand when they are written
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HF_TERNARY_UNROLL
      for (int n = 0; n < kWidth; n += 16) HF_TERNARY_PREFETCH(a.y + r * a.y_stride + n);
    }
  }
  typename Isa::Floats y[kRows][kPanels] = {};
  const std::uint8_t* codes = a.codes;
  const std::int8_t* x = a.x;
  for (std::int64_t g = 0; g < a.groups; ++g) {
    typename Isa::Ints total[kRows][kPanels];
    HF_TERNARY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HF_TERNARY_UNROLL
      for (int p = 0; p < kPanels; ++p) total[r][p] = Isa::zero();
    }
    for (std::int64_t left = a.group_blocks; left > 0;) {
      const std::int64_t blocks = left < Isa::kChunkBlocks ? left : Isa::kChunkBlocks;
      dot_blocks<Isa, kRows, kUnpacked>(total, codes, x, a.stride, blocks);
      codes += blocks * kBlockBytes;
      x += blocks * kBlock;
      left -= blocks;
    }
    HF_TERNARY_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      const auto scale = Isa::load_floats(a.weight_scale + g * kWidth + p * kLanes);
      HF_TERNARY_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const auto part = Isa::mul(Isa::to_floats(Isa::subtract(total[r][p], a.twice_sum[r * a.groups + g])), scale);
        y[r][p] = g == 0 ? part : Isa::add(y[r][p], part);
      }
    }
  }
  HF_TERNARY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float edge[kWidth];
    const bool whole = a.width == kWidth;
    float* out = whole ? a.y + r * a.y_stride : edge;
    HF_TERNARY_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      auto value = Isa::mul(y[r][p], Isa::fill(a.row_scale[r]));
      if (a.bias) value = Isa::add(value, Isa::load_floats(a.bias + p * kLanes));
      if (a.stream && whole) {
        Isa::stream(out + p * kLanes, value);
      } else {
        Isa::store(out + p * kLanes, value);
      }
    }
    if (!whole) std::memcpy(a.y + r * a.y_stride, edge, a.width * sizeof(float));
  }
}

template <class Isa, bool kUnpacked, int kRows = Isa::kRows>
HF_TERNARY_INLINE void run_tile(int rows, const TileArgs& args) {
  if (rows == kRows) return tile<Isa, kRows, kUnpacked>(args);
  if constexpr (kRows > 1) run_tile<Isa, kUnpacked, kRows - 1>(rows, args);
}

// [blocks][panels][vector] of 2-bit codes -> [blocks][4 fields][panels][vector] of bytes.
template <class Isa>
void unpack_strip(const std::uint8_t* packed, std::int64_t blocks, std::uint8_t* out) {
  constexpr int kVector = Isa::kLanes * 4, kPanels = Isa::kPanels;
  for (std::int64_t b = 0; b < blocks; ++b, packed += kPanels * kVector, out += 4 * kPanels * kVector) {
    for (int p = 0; p < kPanels; ++p) {
      const auto bytes = Isa::load(packed + p * kVector);
      Isa::store_bytes(out + (0 * kPanels + p) * kVector, Isa::template field<0>(bytes));
      Isa::store_bytes(out + (1 * kPanels + p) * kVector, Isa::template field<1>(bytes));
      Isa::store_bytes(out + (2 * kPanels + p) * kVector, Isa::template field<2>(bytes));
      Isa::store_bytes(out + (3 * kPanels + p) * kVector, Isa::template field<3>(bytes));
    }
  }
}

template <class Isa>
void multiply(const WeightView& w, const QuantizedRows& x, std::int64_t rows, std::int64_t strip_begin,
              std::int64_t strip_end, const Output& out, std::uint8_t* scratch) {
  constexpr int kWidth = Isa::kLanes * Isa::kPanels;
  const std::int64_t blocks = w.groups * w.group_blocks, stride = w.padded_inputs();
  const std::int64_t tiles = (rows + Isa::kRows - 1) / Isa::kRows;
  const bool unpacked = rows >= w.unpack_rows;
  const bool aligned = reinterpret_cast<std::uintptr_t>(out.y) % 64 == 0 && w.outputs % 16 == 0;
  for (std::int64_t strip = strip_begin; strip < strip_end; ++strip) {
    const std::int64_t first = strip * kWidth, left = w.outputs - first, width = left < kWidth ? left : kWidth;
    const std::uint8_t* codes = w.codes + strip * blocks * kWidth * 4;
    if (unpacked) {
      unpack_strip<Isa>(codes, blocks, scratch);
      codes = scratch;
    }
    float edge[kWidth] = {};  // a bias that ends inside the strip
    const float* strip_bias = out.bias ? out.bias + first : nullptr;
    if (out.bias && width < kWidth) strip_bias = static_cast<float*>(std::memcpy(edge, strip_bias, width * sizeof(float)));
    for (std::int64_t i = 0; i < tiles; ++i) {
      // Neighbours change places. In plain order the stride prefetcher would run on into the rows behind the last tile, and
      // so take from another core's cache the lines of y that it is writing.
      const std::int64_t t = (i ^ 1) < tiles ? i ^ 1 : i;
      // Tiles of nearly equal height: 9 rows are 5 + 4, not 8 + 1.
      const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
      const TileArgs args{codes,
                          w.scale + strip * w.groups * kWidth,
                          w.groups,
                          w.group_blocks,
                          x.codes + begin * stride,
                          stride,
                          x.twice_sum + begin * w.groups,
                          x.scale + begin,
                          strip_bias,
                          out.y + begin * w.outputs + first,
                          w.outputs,
                          width,
                          out.stream && aligned};
      const int height = static_cast<int>(end - begin);
      unpacked ? run_tile<Isa, true>(height, args) : run_tile<Isa, false>(height, args);
    }
  }
  if (out.stream) Isa::stream_fence();
}

// kLanes floats of which `count` exist; the others are zero.
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats load_some(const float* x, std::int64_t count) {
  if (count >= Isa::kLanes) return Isa::load_floats(x);
  float edge[Isa::kLanes] = {};
  std::memcpy(edge, x, count * sizeof(float));
  return Isa::load_floats(edge);
}

// The largest |x| is found among the bits, as integers: a NaN is larger than infinity there, and neither is ever missed.
template <class Isa>
void quantize(const WeightView& w, const float* x, std::int64_t rows, QuantizedRows out) {
  constexpr std::int32_t kInfinity = 0x7f800000;
  constexpr float kSmallest = 0x1p-100f;  // ternarize.SMALLEST_ABSMAX
  const std::int64_t padded = w.group_blocks * kBlock;
  for (std::int64_t r = 0; r < rows; ++r, x += w.inputs, out.codes += w.groups * padded, out.twice_sum += w.groups) {
    auto top = Isa::zero();
    for (std::int64_t k = 0; k < w.inputs; k += Isa::kLanes) {
      top = Isa::max_magnitude(top, load_some<Isa>(x + k, w.inputs - k));
    }
    const std::int32_t bits = Isa::reduce_max(top);
    if (bits >= kInfinity) {
      const std::uint32_t nan = 0x7fc00000;
      std::memcpy(&out.scale[r], &nan, sizeof nan);
      std::memset(out.codes, 0, w.groups * padded);
      std::memset(out.twice_sum, 0, w.groups * sizeof(std::int32_t));
      continue;
    }
    float absmax;
    std::memcpy(&absmax, &bits, sizeof bits);
    const bool zero = absmax < kSmallest;
    out.scale[r] = zero ? 0.0f : absmax / 127.0f;
    const auto inverse = Isa::fill(zero ? 0.0f : 127.0f / absmax);
    for (std::int64_t g = 0; g < w.groups; ++g) {
      const float* from = x + g * w.group_size;
      std::int8_t* to = out.codes + g * padded;
      auto sum = Isa::zero();
      for (std::int64_t k = 0; k < padded; k += Isa::kLanes) {
        const std::int64_t left = w.group_size - k;
        const auto codes = Isa::round(Isa::mul(left > 0 ? load_some<Isa>(from + k, left) : Isa::fill(0.0f), inverse));
        Isa::store_codes(to + k, codes);
        sum = Isa::add_ints(sum, codes);
      }
      out.twice_sum[g] = 2 * Isa::reduce_add(sum);
    }
  }
}

}  // namespace
}  // namespace hf_ternary
