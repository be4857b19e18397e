// A whole transformer encoder in one call: token ids or embedded tokens in, hidden states or pooled embeddings out.
//
// Every kind of layer is the same chain of steps: qkv product, rotation (RoPE), attention in a window, out product, residual
// sum, norm, up product, activation (gated or not), down product, residual sum, norm. What a product reads is the norm of the
// residual stream. In a post-norm encoder the norm also replaces the stream; in a pre-norm one it does not, and a layer's
// first norm, which belongs to that layer's parameters, is here the last norm of the layer before.
// How: tokens of all sequences lie one after the other, without padding. Rows are cut into slices that stay in the L2 cache
// while they pass through a layer: quantize -> product -> row function -> quantize -> ...; a sequence's attention waits for
// all its slices. A batch is cut into blocks of whole sequences, each encoded by one thread from the first layer to the
// last; when there are too few blocks the threads share the slices of one block.
// Every sum has an order that depends only on the sequence: an embedding has the same bits in any batch, on any threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "packed_weight.h"

namespace hf_ternary {

class Scratch;

// A row is added up from tables: quantized as in modules.QuantizedEmbedding, or float32 (bits = 32). The memory is borrowed.
struct Table {
  const void* codes = nullptr;     // uint8 [rows, ceil(width * bits / 8)], or float32 [rows, width]
  const float* scale = nullptr;    // [rows, groups]
  std::int64_t rows = 0, groups = 1;
  int bits = 32;
};

struct LinearSource {
  const std::uint8_t* codes;   // as PackedWeight wants them; read once
  const float* scale;
  const float* bias;           // [outputs] or null
  std::int64_t outputs, inputs, groups;
};

struct NormSource {
  const float* weight;   // [hidden], read once; null: no norm
  const float* bias;     // [hidden], or null: zeros
};

struct LayerSource {
  LinearSource qkv, out, up, down;          // up has 2 * intermediate outputs if the MLP is gated
  NormSource attention_norm, output_norm;   // of the residual stream after attention and after the MLP
  Window window;
  const float* rotation;                    // [reach, head_dim] (see Kernel::rotate; borrowed), or null
};

struct EncoderOptions {
  std::int64_t hidden, heads, intermediate;
  Activation activation;
  bool gated, pre_norm;
  float epsilon;
  std::int64_t padding_id;   // >= 0: positions count tokens other than this one, from padding_id + 1 on; < 0: columns
  Table tokens, positions, types;   // without rows: not there
  NormSource norm, first_norm;      // of the embeddings, and of these before the first layer of a pre-norm encoder
  const float* bias;         // [heads, 2 * reach + 1] added to the scores by distance (read once), or null
  std::int64_t reach;        // tokens of the longest sequence that `bias` and the rotations serve
};

enum class Pooling { none, mean, first };

// Tokens that see each other: columns [begin, begin + length) of a row of ids, or as many embedded tokens.
struct Sequence {
  const std::int64_t* ids;     // the whole row
  const std::int64_t* types;   // the whole row, or null: zeros
  const float* states;         // [length, hidden] instead of ids, or null
  std::int64_t begin, length;
  float* out;                  // [length, hidden], or [hidden] if pooled
};

class Encoder {
 public:
  Encoder(const Kernel& kernel, const EncoderOptions& options);
  Encoder(const Encoder&) = delete;

  void add_layer(const LayerSource& source);

  // Whether every id, type and position of the sequence has a row in its table.
  bool fits(const Sequence& sequence) const;

  // Sequences must fit and hold at least one token. normalize: pooled embeddings get length 1. May be called concurrently.
  void run(const std::vector<Sequence>& sequences, Pooling pooling, bool normalize, int threads) const;

  std::int64_t hidden() const { return options_.hidden; }

 private:
  struct Linear {
    Linear(const Kernel& kernel, const LinearSource& source);
    PackedWeight weight;
    std::vector<float> bias;
  };
  struct NormWeights {
    NormWeights(const NormSource& source, std::int64_t n, float epsilon);
    Norm view() const { return {weight.empty() ? nullptr : weight.data(), bias.data(), epsilon}; }
    std::vector<float> weight, bias;
    float epsilon;
  };
  struct Layer {
    Linear qkv, out, up, down;
    NormWeights attention_norm, output_norm;
    Window window;
    const float* rotation;
  };
  struct Block;
  struct Slice;

  Block carve_block(Scratch& scratch, const Sequence* sequences, std::int64_t count, bool fill) const;
  Slice carve_slice(Scratch& scratch, std::int64_t rows, std::int64_t longest) const;
  void encode(const Block& block, const Slice* slices, std::int64_t count, int threads, Pooling pooling, bool normalize) const;

  // Steps for the rows [begin, end) of a block.
  void embed(const Block& block, std::int64_t begin, std::int64_t end) const;
  void begin_layer(const Layer& layer, const Block& block, std::int64_t begin, std::int64_t end, const Slice& slice) const;
  void finish_layer(const Layer& layer, const Block& block, std::int64_t begin, std::int64_t end, const Slice& slice) const;
  void multiply(const Linear& linear, const float* x, std::int64_t rows, const Slice& slice, float* y) const;
  template <class Visit>
  void for_each_part(const Block& block, std::int64_t begin, std::int64_t end, Visit&& visit) const;

  const Kernel& kernel_;
  EncoderOptions options_;
  std::int64_t dim_;   // of a head, padded to whole vectors
  NormWeights norm_, first_norm_;
  std::vector<float> bias_;
  std::vector<Layer> layers_;
  std::int64_t widest_input_ = 0, most_groups_ = 1;
};

}  // namespace hf_ternary
