#include "packed_weight.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dispatch.h"

namespace hf_ternary {
namespace {

constexpr std::int64_t kUnpackRows = 64;  // then unpacking a strip is a small part of its use
constexpr std::uint32_t kZeros = 0xaaaaaaaa;  // 16 times 2, the stored code of the value 0

// The stored codes of `count` (at most 16) columns from column k of a canonical row, column k in the lowest bits, then zeros.
std::uint32_t read_codes(const std::uint8_t* row, std::int64_t row_bytes, std::int64_t k, std::int64_t count) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, row + k / 4, std::min<std::int64_t>(5, row_bytes - k / 4));
  const std::uint32_t codes = static_cast<std::uint32_t>(bits >> (k % 4 * 2));
  if (count >= kBlock) return codes;
  const std::uint32_t exist = (1u << (2 * count)) - 1;
  return (codes & exist) | (kZeros & ~exist);
}

// Code 4i + j moves to place 4j + i: a 4 x 4 transpose by two delta swaps (Hacker's Delight, section 7-3).
std::uint32_t transpose(std::uint32_t codes) {
  std::uint32_t swap = (codes ^ codes >> 6) & 0x00cc00cc;
  codes ^= swap ^ swap << 6;
  swap = (codes ^ codes >> 12) & 0x0000f0f0;
  return codes ^ swap ^ swap << 12;
}

}  // namespace

PackedWeight::PackedWeight(const Kernel& kernel, const std::uint8_t* codes, const float* scale, std::int64_t outputs,
                           std::int64_t inputs, std::int64_t groups)
    : kernel_(&kernel), strips_(ceil_div(outputs, kernel.strip_width())) {
  const std::int64_t group_size = inputs / groups, group_blocks = ceil_div(group_size, kBlock);
  const std::int64_t lanes = kernel.lanes, panels = kernel.panels, width = kernel.strip_width();
  const std::int64_t row_bytes = ceil_div(inputs, 4), vector = lanes * 4;
  const std::size_t code_bytes = strips_ * groups * group_blocks * panels * vector;
  const std::size_t scales = strips_ * groups * width;

  std::uint8_t* packed = codes_.reserve(std::max<std::size_t>(code_bytes, 1));
  float* packed_scale = scale_.reserve(std::max<std::size_t>(scales, 1));
  std::fill(packed_scale, packed_scale + scales, 0.0f);

  for (std::int64_t n = 0; n < strips_ * width; ++n) {
    const bool exists = n < outputs;
    const std::int64_t strip = n / width, panel = n % width / lanes, lane = n % lanes;
    for (std::int64_t g = 0; g < groups; ++g) {
      if (exists) packed_scale[(strip * groups + g) * width + n % width] = scale[n * groups + g];
      std::uint8_t* out = packed + ((strip * groups + g) * group_blocks * panels + panel) * vector + lane * 4;
      for (std::int64_t k = 0; k < group_size; k += kBlock, out += panels * vector) {
        const std::uint32_t block =
            exists ? transpose(read_codes(codes + n * row_bytes, row_bytes, g * group_size + k, group_size - k)) : kZeros;
        std::memcpy(out, &block, sizeof block);
      }
    }
  }
  view_ = {outputs, inputs, groups, group_size, group_blocks, packed, packed_scale,
           unpacking_pays() ? kUnpackRows : INT64_MAX};
}

}  // namespace hf_ternary
