// x86 with AVX2 (Intel since Haswell, AMD since Zen).
//
// How: vpmaddubsw multiplies 32 stored codes (u8) by 32 activations (s8) and adds pairs into int16 lanes.
// Why it is exact: the instruction saturates, but a pair of ternary codes is at most 2 * 3 * 127 = 762, so 43 of them fit an
// int16; the sums stay int16 for 10 blocks (40 pairs) before vpmaddwd widens them. With int8 weights one pair overflows.
// Layout: panels of 8 outputs, strips of 16. Trade-off: 4 rows x 2 panels leave room for the packed codes among 16 registers.
#include "kernel.h"

#if defined(__AVX2__)

#include "isa_avx2.h"

namespace hf_ternary {
namespace {

struct Avx2 : Avx2Common {
  static constexpr int kRows = 4;
  static constexpr std::int64_t kChunkBlocks = 10;
  using Partial = __m256i;  // 16 lanes of int16

  template <int kField>
  static Partial dot(Partial sum, Bytes w, Row x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, broadcast(x + 4 * kField)));
  }
  static Partial zero_partial() { return _mm256_setzero_si256(); }
  static Partial add_partial(Partial a, Partial b) { return _mm256_add_epi16(a, b); }
  static Ints widen_add(Ints total, Partial sum) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const Kernel* avx2_kernel() {
  static constexpr Kernel kernel = make_kernel<Avx2>("avx2");
  return &kernel;
}

}  // namespace hf_ternary

#else

namespace hf_ternary {
const Kernel* avx2_kernel() { return nullptr; }
}  // namespace hf_ternary

#endif
