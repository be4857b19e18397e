// x86 with AVX-512 VNNI (Intel servers since Cascade Lake, AMD since Zen 4).
//
// How: vpdpbusd multiplies 64 stored codes (u8) by 64 activations (s8) and adds fours into 16 int32 lanes; the activations
// of a row are one broadcast 32-bit word, read straight from memory.
// Why 8 rows x 2 panels: 16 accumulators hide the latency of two dot products a cycle, and each weight vector is used 8 times
// before the next is unpacked. 12 rows would fit the registers, but compilers then spill one accumulator.
// Layout: panels of 16 outputs, strips of 32. Trade-off: N is padded to 32 in memory.
#include "kernel.h"

#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && !defined(__clang__) && defined(__AVX512F__))

#include <immintrin.h>

#include "attention.h"

namespace hf_ternary {
namespace {

struct Avx512Vnni {
  static constexpr int kLanes = 16, kPanels = 2, kRows = 8;
  static constexpr std::int64_t kChunkBlocks = INT64_MAX;
  using Bytes = __m512i;
  using Row = const std::int8_t*;
  using Partial = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static Bytes load(const std::uint8_t* p) { return _mm512_load_si512(p); }
  static void store_bytes(std::uint8_t* p, Bytes v) { _mm512_store_si512(p, v); }
  template <int kField>
  static Bytes field(Bytes v) {
    return _mm512_and_si512(kField == 0 ? v : _mm512_srli_epi16(v, 2 * kField), _mm512_set1_epi8(3));
  }
  static Row row(const std::int8_t* x) { return x; }
  template <int kField>
  static Partial dot(Partial sum, Bytes w, Row x) {
    std::int32_t four;
    std::memcpy(&four, x + 4 * kField, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
  }
  static Partial zero_partial() { return _mm512_setzero_si512(); }
  static Partial add_partial(Partial a, Partial b) { return _mm512_add_epi32(a, b); }
  static Ints widen_add(Ints total, Partial sum) { return _mm512_add_epi32(total, sum); }

  static Ints zero() { return _mm512_setzero_si512(); }
  static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints subtract(Ints a, std::int32_t b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
  static std::int32_t reduce_add(Ints a) { return _mm512_reduce_add_epi32(a); }
  static Ints max_magnitude(Ints top, Floats x) {
    return _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static std::int32_t reduce_max(Ints a) { return _mm512_reduce_max_epi32(a); }

  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, Floats v) { _mm512_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static Floats fill(float x) { return _mm512_set1_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Ints round(Floats x) { return _mm512_cvtps_epi32(x); }

  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
  static float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
  static Floats scale_by_power_of_2(Floats x, Ints n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(n, 23)));
  }

  static Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
  static void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, v); }
  static Ints fill_int(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static Ints join_words(Ints low, Ints high) {
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
  }
  static void store_words(std::int16_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  static void store_codes(std::int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
};

}  // namespace

const Kernel* avx512vnni_kernel() {
  static constexpr Kernel kernel = make_kernel<Avx512Vnni>("avx512vnni");
  return &kernel;
}

}  // namespace hf_ternary

#else

namespace hf_ternary {
const Kernel* avx512vnni_kernel() { return nullptr; }
}  // namespace hf_ternary

#endif
