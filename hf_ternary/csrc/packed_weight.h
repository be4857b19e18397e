// A ternary weight in a kernel's own memory layout, made once from the canonical one (see packing.py).
//
// Outputs are cut into panels of `lanes` outputs, panels into strips; columns into blocks of 16. A vector holds one block
// of one panel, one 32-bit lane an output:
//
//     byte 4 * lane + j, bits 2i and 2i + 1  =  stored code (1, 2, 3) of column 4i + j of the block       i, j = 0..3
//
// so that `(vector >> 2i) & 3` are the operands of one 4-way dot product with columns 4i .. 4i+3 of a row of activations.
// Trade-off: the weight exists twice in memory (canonical and packed, 2 bits each); in return the hot loop needs neither
// shuffles nor tails. Outputs and columns that do not exist hold the code of zero and a scale of zero.
#pragma once

#include <cstdint>

#include "aligned_buffer.h"
#include "kernel.h"

namespace hf_ternary {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class PackedWeight {
 public:
  // codes uint8 [outputs, ceil(inputs / 4)] and scale float32 [outputs, groups], both dense; groups divides inputs.
  PackedWeight(const Kernel& kernel, const std::uint8_t* codes, const float* scale, std::int64_t outputs,
               std::int64_t inputs, std::int64_t groups);

  const Kernel& kernel() const { return *kernel_; }
  const WeightView& view() const { return view_; }
  std::int64_t strips() const { return strips_; }

 private:
  const Kernel* kernel_;
  WeightView view_;
  std::int64_t strips_;
  AlignedBuffer<std::uint8_t> codes_;
  AlignedBuffer<float> scale_;
};

}  // namespace hf_ternary
