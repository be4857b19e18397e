// A whole ternary linear layer on several threads: quantize the rows, multiply, write float32.
#pragma once

#include <cstdint>

#include "packed_weight.h"

namespace hf_ternary {

// y[rows, outputs] = dequantize(quantize(x[rows, inputs]) * weight) + bias, all float32 and dense; bias may be null.
// At most `threads` threads; fewer when the work is too small to be worth waking them. May be called concurrently.
void linear(const PackedWeight& weight, const float* x, std::int64_t rows, const float* bias, float* y, int threads);

}  // namespace hf_ternary
