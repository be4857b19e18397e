// What the AVX2 and the AVX-VNNI kernel share: everything but the dot product.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace hf_ternary {
namespace {

struct Avx2Common {
  static constexpr int kLanes = 8, kPanels = 2;
  using Bytes = __m256i;
  using Row = const std::int8_t*;
  using Ints = __m256i;
  using Floats = __m256;

  static Bytes load(const std::uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bytes(std::uint8_t* p, Bytes v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  template <int kField>
  static Bytes field(Bytes v) {
    return _mm256_and_si256(kField == 0 ? v : _mm256_srli_epi16(v, 2 * kField), _mm256_set1_epi8(3));
  }
  static Row row(const std::int8_t* x) { return x; }
  static __m256i broadcast(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }

  static Ints zero() { return _mm256_setzero_si256(); }
  static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints subtract(Ints a, std::int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
  static std::int32_t reduce_add(Ints a) {
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
  }
  static Ints max_magnitude(Ints top, Floats x) {
    return _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
  }
  static std::int32_t reduce_max(Ints a) {
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
  }

  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, Floats v) { _mm256_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static Floats fill(float x) { return _mm256_set1_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static Ints round(Floats x) { return _mm256_cvtps_epi32(x); }

  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
  static Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static float reduce_add(Floats a) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  static float reduce_max(Floats a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static Floats scale_by_power_of_2(Floats x, Ints n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(n, 23)));
  }

  static Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_ints(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Ints fill_int(std::int32_t x) { return _mm256_set1_epi32(x); }
  static Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Ints join_words(Ints low, Ints high) {
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(high, 16));
  }
  static void store_words(std::int16_t* p, Ints a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
  }
  static void store_codes(std::int8_t* p, Ints a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
};

}  // namespace
}  // namespace hf_ternary
