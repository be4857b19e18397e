// A whole transformer encoder in one call: token ids in, hidden states or pooled embeddings out.
//
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
  float multiplier = 1.0f;
};

struct LinearSource {
  const std::uint8_t* codes;   // as PackedWeight wants them; read once
  const float* scale;
  const float* bias;           // [outputs] or null
  std::int64_t outputs, inputs, groups;
};

struct NormSource {
  const float* weight;   // [hidden], read once
  const float* bias;
};

struct LayerSource {
  LinearSource qkv, out, up, down;
  NormSource attention_norm, output_norm;
};

struct EncoderOptions {
  std::int64_t hidden, heads, intermediate;
  Activation activation;
  float epsilon;
  std::int64_t padding_id;   // >= 0: positions count tokens other than this one, from padding_id + 1 on; < 0: columns
  Table tokens, positions, types;   // types may have no rows
  NormSource norm;
  const float* bias;         // [heads, 2 * bias_reach + 1] added to the scores by distance (read once), or null
  std::int64_t bias_reach;
};

enum class Pooling { none, mean, first };

// Tokens that see each other: columns [begin, begin + length) of a row of ids.
struct Sequence {
  const std::int64_t* ids;     // the whole row
  const std::int64_t* types;   // the whole row, or null: zeros
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
    Norm view() const { return {weight.data(), bias.data(), epsilon}; }
    std::vector<float> weight, bias;
    float epsilon;
  };
  struct Layer {
    Linear qkv, out, up, down;
    NormWeights attention_norm, output_norm;
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
  NormWeights norm_;
  std::vector<float> bias_;
  std::vector<Layer> layers_;
  std::int64_t widest_input_ = 0, most_groups_ = 1;
};

}  // namespace hf_ternary
