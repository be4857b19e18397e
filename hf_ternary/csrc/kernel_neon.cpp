// 64-bit Arm with the dot product extension (Armv8.2 dotprod: Apple M1, AWS Graviton2, Raspberry Pi 5 and later).
//
// How: sdot multiplies 16 stored codes by 16 activations and adds fours into 4 int32 lanes; its "by lane" form picks the four
// activations out of a register that holds 16 columns of a row.
// Why 8 rows x 2 panels: 16 accumulators, 8 rows, packed and unpacked weights fit the 32 registers.
// Layout: panels of 4 outputs, strips of 8. Trade-off: codes are unpacked to {1, 2, 3} as on x86, although sdot would take
// {-1, 0, 1}: the same correction serves all kernels and saves a subtraction a vector.
#include "kernel.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#include "attention.h"

namespace hf_ternary {
namespace {

struct Neon {
  static constexpr int kLanes = 4, kPanels = 2, kRows = 8;
  static constexpr std::int64_t kChunkBlocks = INT64_MAX;
  using Bytes = uint8x16_t;
  using Row = int8x16_t;
  using Partial = int32x4_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static Bytes load(const std::uint8_t* p) { return vld1q_u8(p); }
  static void store_bytes(std::uint8_t* p, Bytes v) { vst1q_u8(p, v); }
  template <int kField>
  static Bytes field(Bytes v) {
    if constexpr (kField == 0) return vandq_u8(v, vdupq_n_u8(3));
    else if constexpr (kField == 3) return vshrq_n_u8(v, 6);
    else return vandq_u8(vshrq_n_u8(v, 2 * kField), vdupq_n_u8(3));
  }
  static Row row(const std::int8_t* x) { return vld1q_s8(x); }
  template <int kField>
  static Partial dot(Partial sum, Bytes w, Row x) {
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(w), x, kField);
  }
  static Partial zero_partial() { return vdupq_n_s32(0); }
  static Partial add_partial(Partial a, Partial b) { return vaddq_s32(a, b); }
  static Ints widen_add(Ints total, Partial sum) { return vaddq_s32(total, sum); }

  static Ints zero() { return vdupq_n_s32(0); }
  static Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints subtract(Ints a, std::int32_t b) { return vsubq_s32(a, vdupq_n_s32(b)); }
  static std::int32_t reduce_add(Ints a) { return vaddvq_s32(a); }
  static Ints max_magnitude(Ints top, Floats x) {
    return vmaxq_s32(top, vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff)));
  }
  static std::int32_t reduce_max(Ints a) { return vmaxvq_s32(a); }

  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Floats v) { vst1q_f32(p, v); }
  static void stream(float* p, Floats v) { store(p, v); }
  static void stream_fence() {}
  static Floats fill(float x) { return vdupq_n_f32(x); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
  static Ints round(Floats x) { return vcvtnq_s32_f32(x); }

  static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
  static float reduce_add(Floats a) { return vaddvq_f32(a); }
  static float reduce_max(Floats a) { return vmaxvq_f32(a); }
  static Floats scale_by_power_of_2(Floats x, Ints n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(n, 23)));
  }

  static Ints load_ints(const void* p) { return vld1q_s32(static_cast<const std::int32_t*>(p)); }
  static void store_ints(void* p, Ints v) { vst1q_s32(static_cast<std::int32_t*>(p), v); }
  static Ints fill_int(std::int32_t x) { return vdupq_n_s32(x); }
  static Ints dot_pairs(Ints sum, Ints a, Ints b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return vaddq_s32(sum, vpaddq_s32(low, high));
  }
  static Ints join_words(Ints low, Ints high) { return vsliq_n_s32(low, high, 16); }
  static void store_words(std::int16_t* p, Ints a) { vst1_s16(p, vmovn_s32(a)); }
  static void store_codes(std::int8_t* p, Ints a) {
    const int16x4_t words = vmovn_s32(a);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    const std::int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(p, &four, 4);
  }
};

}  // namespace

const Kernel* neon_kernel() {
  static constexpr Kernel kernel = make_kernel<Neon>("neon");
  return &kernel;
}

}  // namespace hf_ternary

#else

namespace hf_ternary {
const Kernel* neon_kernel() { return nullptr; }
}  // namespace hf_ternary

#endif
