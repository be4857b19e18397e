// x86 with AVX-VNNI: vpdpbusd on 256-bit registers, for CPUs without AVX-512 (Intel since Alder Lake, AMD since Zen 5).
//
// How and why: as kernel_avx512vnni.cpp, with half the vector and half the registers.
// Layout: as kernel_avx2.cpp. Trade-off: 16 registers hold 4 rows x 2 panels beside the packed codes.
#include "kernel.h"

#if defined(__AVXVNNI__) || (defined(_MSC_VER) && !defined(__clang__) && defined(__AVX2__))

#include "isa_avx2.h"

namespace hf_ternary {
namespace {

struct AvxVnni : Avx2Common {
  static constexpr int kRows = 4;
  static constexpr std::int64_t kChunkBlocks = INT64_MAX;
  using Partial = Ints;

  template <int kField>
  static Partial dot(Partial sum, Bytes w, Row x) {
    return _mm256_dpbusd_avx_epi32(sum, w, broadcast(x + 4 * kField));
  }
  static Partial zero_partial() { return zero(); }
  static Partial add_partial(Partial a, Partial b) { return add_ints(a, b); }
  static Ints widen_add(Ints total, Partial sum) { return add_ints(total, sum); }
};

}  // namespace

const Kernel* avxvnni_kernel() {
  static constexpr Kernel kernel = make_kernel<AvxVnni>("avxvnni");
  return &kernel;
}

}  // namespace hf_ternary

#else

namespace hf_ternary {
const Kernel* avxvnni_kernel() { return nullptr; }
}  // namespace hf_ternary

#endif
