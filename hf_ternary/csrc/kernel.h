// The contract between the kernels (one file an instruction set) and their callers.
//
// A kernel multiplies int8 activations by ternary weights on one thread: it knows neither threads nor Python. Whole layers
// go through linear.h; an encoder that fuses several layers calls `quantize` and `multiply` itself, on its own threads.
#pragma once

#include <cstdint>

namespace hf_ternary {

// Columns of one packed vector: each byte holds 4 codes, each 32-bit lane 4 bytes.
constexpr std::int64_t kBlock = 16;

// Columns of the widest head that attention takes: architectures.WIDEST_HEAD.
constexpr std::int64_t kWidestHead = 1024;

// What a kernel reads of a weight; packed_weight.h owns the memory and shows the layout.
struct WeightView {
  std::int64_t outputs, inputs;      // N, K
  std::int64_t groups, group_size;   // groups * group_size = K; a group shares one scale
  std::int64_t group_blocks;         // blocks of a group: ceil(group_size / kBlock)
  const std::uint8_t* codes;         // [strips][groups][group_blocks][panels][lanes * 4]
  const float* scale;                // [strips][groups][panels * lanes]

  std::int64_t unpack_rows;          // from this many rows on, a strip is unpacked to bytes before use (see tile.h)

  std::int64_t padded_inputs() const { return groups * group_blocks * kBlock; }
};

// Rows of activations in int8, each group padded with zeros to whole blocks.
struct QuantizedRows {
  std::int8_t* codes;        // [rows][padded_inputs]
  std::int32_t* twice_sum;   // [rows][groups]: twice the sum of the codes; undoes the offset of the stored weights
  float* scale;              // [rows]; NaN for a row with a NaN or an infinity
};

// Where the products go. Streaming writes past the caches: it saves reading each line first, and pays for outputs that no
// cache would hold until they are used.
struct Output {
  float* y;            // [rows, N], dense
  const float* bias;   // [N] or null
  bool stream;
};

struct Norm {
  const float* weight;   // [n], or null: the identity
  const float* bias;     // [n]
  float epsilon;
};

enum class Activation { gelu, gelu_tanh, quick_gelu, silu, relu };

// The keys that a query sees, apart from those that do not exist: from `before` tokens before it to `after` tokens after it.
struct Window {
  std::int64_t before, after;
};

// Attention computes with int16 operands and int32 sums: exact, so that no order of tiles or threads shows, and twice as many
// multiply-adds an instruction as float32. Every head of every token has a scale of its own. Keys are padded to whole
// vectors of `lanes`, head_dim to whole vectors of zeros (`dim`); two neighbours along the summed dimension are one pair.
struct AttentionOperands {
  std::int64_t heads, head_dim, dim;
  std::int64_t tokens, padded;    // of one sequence; padded to a multiple of lanes
  std::int16_t* query;            // [heads][tokens][dim]
  float* query_scale;             // [heads][tokens], log2(e) / sqrt(head_dim) included
  std::int16_t* key;              // [heads][padded / lanes][dim / 2][lanes][2]
  float* key_scale;               // [heads][padded]
  std::int16_t* value;            // [heads][dim / lanes][padded / 2][lanes][2]
  float* value_scale;             // [heads][padded], 0 beyond tokens
  const float* bias;              // [heads][2 * bias_reach + 1], times log2(e), by key - query: added to the scores; or null
  std::int64_t bias_reach;        // at least tokens - 1
  Window window;

  std::int64_t first_key(std::int64_t query) const { return query > window.before ? query - window.before : 0; }
  std::int64_t end_key(std::int64_t query) const { return tokens - query > window.after ? query + window.after + 1 : tokens; }
};

struct Kernel {
  const char* name;
  int lanes;    // outputs of a panel: 32-bit lanes of the vector
  int panels;   // panels of a strip, which is what one tile multiplies by
  int rows;     // rows of the largest tile

  // x float32 [rows, K], dense -> out. One scale a row: see ternarize.quantize_activation, which gives the same bits.
  void (*quantize)(const WeightView& weight, const float* x, std::int64_t rows, QuantizedRows out);

  // out.y for the outputs of the strips [strip_begin, strip_end). `scratch`, on a cache line, has room for
  // strip_width() * padded_inputs() bytes.
  void (*multiply)(const WeightView& weight, const QuantizedRows& x, std::int64_t rows, std::int64_t strip_begin,
                   std::int64_t strip_end, const Output& out, std::uint8_t* scratch);

  // x[rows, n] += y unless y is null; out[rows, n] = layer norm of x. `out` may be x.
  void (*normalize)(float* x, const float* y, std::int64_t rows, std::int64_t n, const Norm& norm, float* out);

  // x[rows, n] = activation(x[rows, n]); gated: x[rows, n] = activation(left half) * right half of x[rows, 2 * n].
  void (*activate)(Activation activation, bool gated, float* x, std::int64_t rows, std::int64_t n);

  // Rotates the queries and keys in rows of [query | key | value], float32 [rows, 3 * heads * head_dim], by their positions
  // (RoPE, arXiv:2104.09864): `rotation` float32 [rows, head_dim] holds cosines, then sines, of a half's angles.
  void (*rotate)(float* qkv, std::int64_t rows, std::int64_t heads, std::int64_t head_dim, const float* rotation);

  // Quantizes rows of [query | key | value], float32 [rows, 3 * heads * head_dim], which are the tokens from `first` on.
  void (*load_attention)(const float* qkv, std::int64_t first, std::int64_t rows, const AttentionOperands& out);

  // y[rows, heads * head_dim] = softmax(query key') value for the queries from `first` on. `scratch`, on a cache line, has
  // room for attention_scratch(padded) bytes.
  void (*attend)(const AttentionOperands& operands, std::int64_t first, std::int64_t rows, float* y, std::uint8_t* scratch);

  std::int64_t attention_scratch(std::int64_t padded) const { return rows * padded * 6; }
  std::int64_t strip_width() const { return std::int64_t{lanes} * panels; }
};

// Null where the compiler or the target architecture lacks the instruction set.
const Kernel* scalar_kernel();
const Kernel* avx2_kernel();
const Kernel* avxvnni_kernel();
const Kernel* avx512vnni_kernel();
const Kernel* neon_kernel();

}  // namespace hf_ternary
