#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.h"
#include "thread_pool.h"

namespace hf_ternary {
namespace {

constexpr std::int64_t kSliceRows = 64;     // rows that pass through a layer together
constexpr std::int64_t kBlockTokens = 128;  // tokens of a block, if its sequences are short

std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Code i of a row of `kBits`-bit codes stands for (code - 2**(kBits - 1) + 1/2) * scale.
template <int kBits>
void add_codes(const std::uint8_t* codes, const float* scale, std::int64_t group_size, float* x, std::int64_t width) {
  constexpr int kMask = (1 << kBits) - 1, kPerByte = 8 / kBits;
  constexpr float kOffset = 0.5f - (1 << (kBits - 1));
  for (std::int64_t k = 0; k < width; ++scale) {
    for (const std::int64_t end = k + group_size; k < end; ++k) {
      const int code = codes[k / kPerByte] >> (k % kPerByte * kBits) & kMask;
      x[k] += (static_cast<float>(code) + kOffset) * *scale;
    }
  }
}

void add_row(const Table& table, std::int64_t row, float* x, std::int64_t width) {
  if (table.bits == 32) {
    const float* values = static_cast<const float*>(table.codes) + row * width;
    for (std::int64_t k = 0; k < width; ++k) x[k] += values[k];
    return;
  }
  const std::uint8_t* codes = static_cast<const std::uint8_t*>(table.codes) + row * ceil_div(width * table.bits, 8);
  const float* scale = table.scale + row * table.groups;
  const std::int64_t size = width / table.groups;
  if (table.bits == 2) add_codes<2>(codes, scale, size, x, width);
  if (table.bits == 4) add_codes<4>(codes, scale, size, x, width);
  if (table.bits == 8) add_codes<8>(codes, scale, size, x, width);
}

// The position of column `column`, given how many tokens other than padding lie before it.
std::int64_t position(std::int64_t padding_id, std::int64_t id, std::int64_t column, std::int64_t before) {
  if (padding_id < 0) return column;
  return id == padding_id ? padding_id : padding_id + 1 + before;
}

template <class Visit>
bool for_each_token(const Sequence& s, std::int64_t padding_id, Visit&& visit) {
  std::int64_t before = 0;
  for (std::int64_t c = padding_id < 0 ? s.begin : 0; c < s.begin + s.length; ++c) {
    if (c >= s.begin && !visit(c - s.begin, s.ids[c], s.types ? s.types[c] : 0, position(padding_id, s.ids[c], c, before))) {
      return false;
    }
    before += s.ids[c] != padding_id;
  }
  return true;
}

void pool(const float* x, std::int64_t tokens, std::int64_t hidden, Pooling pooling, bool normalize, float* out) {
  std::memcpy(out, x, hidden * sizeof(float));
  if (pooling == Pooling::mean) {
    for (std::int64_t t = 1; t < tokens; ++t) {
      for (std::int64_t k = 0; k < hidden; ++k) out[k] += x[t * hidden + k];
    }
    for (std::int64_t k = 0; k < hidden; ++k) out[k] /= static_cast<float>(tokens);
  }
  if (!normalize) return;
  float squares = 0.0f;
  for (std::int64_t k = 0; k < hidden; ++k) squares += out[k] * out[k];
  const float length = std::sqrt(squares) < 1e-12f ? 1e-12f : std::sqrt(squares);  // a NaN stays one
  for (std::int64_t k = 0; k < hidden; ++k) out[k] /= length;
}

}  // namespace

// Whole sequences, and what they carry from layer to layer.
struct Encoder::Block {
  const Sequence* sequences;
  std::int64_t count, tokens, longest;
  float* x;                       // [tokens, hidden]: the residual stream
  float* h;                       // [tokens, hidden]: its norm, which the next product reads; post-norm: x itself
  std::int64_t* start;            // [count + 1]: first token of each sequence
  AttentionOperands* attention;   // [count]
};

// One thread's memory for one slice of rows on its way through a layer.
struct Encoder::Slice {
  float *wide, *narrow;   // [rows, widest output], [rows, hidden]
  QuantizedRows codes;
  std::uint8_t* unpacked;
  std::uint8_t* attention;
};

Encoder::Linear::Linear(const Kernel& kernel, const LinearSource& s)
    : weight(kernel, s.codes, s.scale, s.outputs, s.inputs, s.groups) {
  if (s.bias) bias.assign(s.bias, s.bias + s.outputs);
}

Encoder::NormWeights::NormWeights(const NormSource& source, std::int64_t n, float eps) : bias(n), epsilon(eps) {
  if (source.weight) weight.assign(source.weight, source.weight + n);
  if (source.bias) bias.assign(source.bias, source.bias + n);
}

Encoder::Encoder(const Kernel& kernel, const EncoderOptions& options)
    : kernel_(kernel),
      options_(options),
      dim_(round_up(options.hidden / options.heads, kernel.lanes)),
      norm_(options.norm, options.hidden, options.epsilon),
      first_norm_(options.first_norm, options.hidden, options.epsilon) {
  if (options.bias) bias_.assign(options.bias, options.bias + options.heads * (2 * options.reach + 1));
  for (float& bias : bias_) bias *= 1.44269504f;  // log2(e): attention raises 2, not e
}

void Encoder::add_layer(const LayerSource& s) {
  const auto linear = [&](const LinearSource& source) { return Linear(kernel_, source); };
  const auto norm = [&](const NormSource& source) { return NormWeights(source, options_.hidden, options_.epsilon); };
  layers_.push_back({linear(s.qkv), linear(s.out), linear(s.up), linear(s.down), norm(s.attention_norm), norm(s.output_norm),
                     s.window, s.rotation});
  for (const Linear* l : {&layers_.back().qkv, &layers_.back().out, &layers_.back().up, &layers_.back().down}) {
    widest_input_ = std::max(widest_input_, l->weight.view().padded_inputs());
    most_groups_ = std::max(most_groups_, l->weight.view().groups);
  }
}

bool Encoder::fits(const Sequence& sequence) const {
  const auto has = [](const Table& table, std::int64_t row) { return row >= 0 && row < table.rows; };
  if (sequence.length > options_.reach) return false;
  if (sequence.states) return true;
  return for_each_token(sequence, options_.padding_id,
                        [&](std::int64_t, std::int64_t id, std::int64_t type, std::int64_t position) {
                          return has(options_.tokens, id) &&
                                 (options_.positions.rows == 0 || has(options_.positions, position)) &&
                                 (options_.types.rows == 0 ? type == 0 : has(options_.types, type));
                        });
}

Encoder::Block Encoder::carve_block(Scratch& scratch, const Sequence* sequences, std::int64_t count, bool fill) const {
  const std::int64_t lanes = kernel_.lanes, heads = options_.heads;
  Block block{sequences, count,   0, 0, nullptr, nullptr, scratch.take<std::int64_t>(count + 1),
              scratch.take<AttentionOperands>(count)};
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t tokens = sequences[i].length, padded = round_up(tokens, lanes);
    const AttentionOperands operands{heads,
                                     options_.hidden / heads,
                                     dim_,
                                     tokens,
                                     padded,
                                     scratch.take<std::int16_t>(heads * tokens * dim_),
                                     scratch.take<float>(heads * tokens),
                                     scratch.take<std::int16_t>(heads * padded * dim_),
                                     scratch.take<float>(heads * padded),
                                     scratch.take<std::int16_t>(heads * padded * dim_),
                                     scratch.take<float>(heads * padded),
                                     bias_.empty() ? nullptr : bias_.data(),
                                     options_.reach,
                                     {}};
    if (fill) {
      block.start[i] = block.tokens;
      block.attention[i] = operands;
      for (std::int64_t h = 0; h < heads; ++h) {
        std::fill(operands.value_scale + h * padded + tokens, operands.value_scale + (h + 1) * padded, 0.0f);
      }
    }
    block.tokens += tokens;
    block.longest = std::max(block.longest, tokens);
  }
  if (fill) block.start[count] = block.tokens;
  block.x = scratch.take<float>(block.tokens * options_.hidden);
  block.h = options_.pre_norm ? scratch.take<float>(block.tokens * options_.hidden) : block.x;
  return block;
}

Encoder::Slice Encoder::carve_slice(Scratch& scratch, std::int64_t rows, std::int64_t longest) const {
  const std::int64_t wide = std::max(3 * options_.hidden, (options_.gated ? 2 : 1) * options_.intermediate);
  return {scratch.take<float>(rows * wide),
          scratch.take<float>(rows * options_.hidden),
          {scratch.take<std::int8_t>(rows * widest_input_), scratch.take<std::int32_t>(rows * most_groups_),
           scratch.take<float>(rows)},
          scratch.take<std::uint8_t>(kernel_.strip_width() * widest_input_),
          scratch.take<std::uint8_t>(kernel_.attention_scratch(round_up(longest, kernel_.lanes)))};
}

// Calls visit(sequence, first token of it, row, rows) for every sequence that has rows in [begin, end) of the block.
template <class Visit>
void Encoder::for_each_part(const Block& block, std::int64_t begin, std::int64_t end, Visit&& visit) const {
  std::int64_t i = std::upper_bound(block.start, block.start + block.count, begin) - block.start - 1;
  for (std::int64_t row = begin; row < end; ++i) {
    const std::int64_t rows = std::min(end, block.start[i + 1]) - row;
    visit(i, row - block.start[i], row, rows);
    row += rows;
  }
}

void Encoder::embed(const Block& block, std::int64_t begin, std::int64_t end) const {
  const std::int64_t hidden = options_.hidden;
  float* const start = block.x + begin * hidden;
  std::fill(start, block.x + end * hidden, 0.0f);
  for_each_part(block, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t row, std::int64_t rows) {
    const Sequence& sequence = block.sequences[i];
    if (sequence.states) {
      std::memcpy(block.x + row * hidden, sequence.states + first * hidden, rows * hidden * sizeof(float));
      return;
    }
    for_each_token(sequence, options_.padding_id,
                   [&](std::int64_t token, std::int64_t id, std::int64_t type, std::int64_t position) {
                     if (token < first) return true;
                     if (token >= first + rows) return false;
                     float* x = block.x + (row + token - first) * hidden;
                     add_row(options_.tokens, id, x, hidden);
                     if (options_.types.rows) add_row(options_.types, type, x, hidden);
                     if (options_.positions.rows) add_row(options_.positions, position, x, hidden);
                     return true;
                   });
  });
  kernel_.normalize(start, nullptr, end - begin, hidden, norm_.view(), start);
  if (!options_.pre_norm) return;
  kernel_.normalize(start, nullptr, end - begin, hidden, first_norm_.view(), block.h + begin * hidden);
}

void Encoder::multiply(const Linear& linear, const float* x, std::int64_t rows, const Slice& slice, float* y) const {
  const WeightView& weight = linear.weight.view();
  kernel_.quantize(weight, x, rows, slice.codes);
  const Output out{y, linear.bias.empty() ? nullptr : linear.bias.data(), false};
  kernel_.multiply(weight, slice.codes, rows, 0, linear.weight.strips(), out, slice.unpacked);
}

void Encoder::begin_layer(const Layer& layer, const Block& block, std::int64_t begin, std::int64_t end,
                          const Slice& slice) const {
  const std::int64_t hidden = options_.hidden;
  multiply(layer.qkv, block.h + begin * hidden, end - begin, slice, slice.wide);
  for_each_part(block, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t row, std::int64_t rows) {
    const AttentionOperands& operands = block.attention[i];
    float* qkv = slice.wide + (row - begin) * 3 * hidden;
    if (layer.rotation) {
      kernel_.rotate(qkv, rows, operands.heads, operands.head_dim, layer.rotation + first * operands.head_dim);
    }
    kernel_.load_attention(qkv, first, rows, operands);
  });
}

void Encoder::finish_layer(const Layer& layer, const Block& block, std::int64_t begin, std::int64_t end,
                           const Slice& slice) const {
  const std::int64_t hidden = options_.hidden, n = end - begin;
  float *x = block.x + begin * hidden, *h = block.h + begin * hidden;
  for_each_part(block, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t row, std::int64_t rows) {
    AttentionOperands operands = block.attention[i];
    operands.window = layer.window;
    kernel_.attend(operands, first, rows, slice.wide + (row - begin) * hidden, slice.attention);
  });
  multiply(layer.out, slice.wide, n, slice, slice.narrow);
  kernel_.normalize(x, slice.narrow, n, hidden, layer.attention_norm.view(), h);
  multiply(layer.up, h, n, slice, slice.wide);
  kernel_.activate(options_.activation, options_.gated, slice.wide, n, options_.intermediate);
  multiply(layer.down, slice.wide, n, slice, slice.narrow);
  kernel_.normalize(x, slice.narrow, n, hidden, layer.output_norm.view(), h);
}

void Encoder::encode(const Block& block, const Slice* slices, std::int64_t count, int threads, Pooling pooling,
                     bool normalize) const {
  const auto for_each_slice = [&](auto&& work) {
    ThreadPool::instance().run(threads, count, [&](std::int64_t slice, int thread) {
      work(block.tokens * slice / count, block.tokens * (slice + 1) / count, slices[thread]);
    });
  };
  for_each_slice([&](std::int64_t begin, std::int64_t end, const Slice&) { embed(block, begin, end); });
  for (const Layer& layer : layers_) {
    for_each_slice([&](std::int64_t begin, std::int64_t end, const Slice& slice) {
      begin_layer(layer, block, begin, end, slice);
    });
    for_each_slice([&](std::int64_t begin, std::int64_t end, const Slice& slice) {
      finish_layer(layer, block, begin, end, slice);
    });
  }
  for (std::int64_t i = 0; i < block.count; ++i) {
    const float* x = block.h + block.start[i] * options_.hidden;
    const Sequence& s = block.sequences[i];
    if (pooling == Pooling::none) std::memcpy(s.out, x, s.length * options_.hidden * sizeof(float));
    else pool(x, s.length, options_.hidden, pooling, normalize, s.out);
  }
}

void Encoder::run(const std::vector<Sequence>& sequences, Pooling pooling, bool normalize, int threads) const {
  std::int64_t total = 0, longest = 0;
  for (const Sequence& s : sequences) {
    total += s.length;
    longest = std::max(longest, s.length);
  }
  if (total == 0) return;
  threads = static_cast<int>(std::clamp<std::int64_t>(threads, 1, total));

  // Blocks of about equal size, as many for each thread; one block for all threads where that does not come out even.
  std::int64_t blocks = round_up(ceil_div(total, kBlockTokens), threads);
  if (threads > 1 && total < blocks * longest) blocks = round_up(total / longest, threads);
  const bool shared = threads > 1 && blocks < 4 * threads && total < 4 * blocks * longest;
  if (shared) blocks = 1;

  std::vector<std::int64_t> first{0};
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    tokens += sequences[i].length;
    const auto cut = static_cast<std::int64_t>(first.size());
    if (tokens * blocks >= total * cut) first.push_back(static_cast<std::int64_t>(i) + 1);
  }
  blocks = static_cast<std::int64_t>(first.size()) - 1;

  const int workers = static_cast<int>(std::min<std::int64_t>(shared ? threads : 1, total));
  const auto slice_count = [&](std::int64_t n) { return std::min(round_up(ceil_div(n, kSliceRows), workers), n); };
  std::int64_t block_bytes = 0, slice_rows = 0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    Scratch measure = Scratch::measure();
    const Block block = carve_block(measure, &sequences[first[b]], first[b + 1] - first[b], false);
    block_bytes = std::max(block_bytes, measure.taken());
    slice_rows = std::max(slice_rows, ceil_div(block.tokens, slice_count(block.tokens)));
  }
  Scratch measure = Scratch::measure();
  carve_slice(measure, slice_rows, longest);
  const std::int64_t slice_bytes = measure.taken();

  Scratch memory((block_bytes * (shared ? 1 : threads)) + slice_bytes * threads);
  std::vector<Slice> slices(threads);
  for (Slice& slice : slices) slice = carve_slice(memory, slice_rows, longest);
  ThreadPool::instance().run(shared ? 1 : threads, blocks, [&](std::int64_t b, int thread) {
    Scratch own = memory.skip(block_bytes * thread);
    const Block block = carve_block(own, &sequences[first[b]], first[b + 1] - first[b], true);
    encode(block, &slices[thread], slice_count(block.tokens), workers, pooling, normalize);
  });
}

}  // namespace hf_ternary
