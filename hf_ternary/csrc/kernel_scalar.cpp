// Portable C++: the backend of last resort, and the plainest statement of what the others compute.
//
// How: the tile of tile.h over "vectors" that are small arrays. Why: any CPU, any compiler; compilers turn the loops into
// whatever baseline SIMD they have. Layout: panels of 4 outputs. Trade-off: plain to read, not tuned.
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace hf_ternary {
namespace {

struct Scalar {
  static constexpr int kLanes = 4, kPanels = 2, kRows = 4;
  static constexpr std::int64_t kChunkBlocks = INT64_MAX;
  struct Bytes {
    std::uint8_t at[16];
  };
  struct Ints {
    std::int32_t at[4];
  };
  struct Floats {
    float at[4];
  };
  using Row = const std::int8_t*;
  using Partial = Ints;

  static Bytes load(const std::uint8_t* p) {
    Bytes v;
    std::memcpy(v.at, p, 16);
    return v;
  }
  static void store_bytes(std::uint8_t* p, Bytes v) { std::memcpy(p, v.at, 16); }
  template <int kField>
  static Bytes field(Bytes v) {
    for (auto& byte : v.at) byte = byte >> (2 * kField) & 3;
    return v;
  }
  static Row row(const std::int8_t* x) { return x; }
  template <int kField>
  static Partial dot(Partial sum, Bytes w, Row x) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int j = 0; j < 4; ++j) sum.at[lane] += w.at[4 * lane + j] * x[4 * kField + j];
    }
    return sum;
  }
  static Partial zero_partial() { return {}; }
  static Partial add_partial(Partial a, Partial b) { return add_ints(a, b); }
  static Ints widen_add(Ints total, Partial sum) { return add_ints(total, sum); }

  static Ints zero() { return {}; }
  static Ints add_ints(Ints a, Ints b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Ints subtract(Ints a, std::int32_t b) {
    for (auto& v : a.at) v -= b;
    return a;
  }
  static std::int32_t reduce_add(Ints a) { return a.at[0] + a.at[1] + a.at[2] + a.at[3]; }
  static Ints max_magnitude(Ints top, Floats x) {
    for (int i = 0; i < 4; ++i) {
      std::int32_t bits;
      std::memcpy(&bits, &x.at[i], 4);
      bits &= 0x7fffffff;
      if (bits > top.at[i]) top.at[i] = bits;
    }
    return top;
  }
  static std::int32_t reduce_max(Ints a) {
    std::int32_t top = 0;
    for (auto v : a.at) top = v > top ? v : top;
    return top;
  }

  static Floats load_floats(const float* p) {
    Floats v;
    std::memcpy(v.at, p, 16);
    return v;
  }
  static void store(float* p, Floats v) { std::memcpy(p, v.at, 16); }
  static void stream(float* p, Floats v) { store(p, v); }
  static void stream_fence() {}
  static Floats fill(float x) { return {{x, x, x, x}}; }
  static Floats mul(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static Floats add(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Floats to_floats(Ints a) {
    Floats v;
    for (int i = 0; i < 4; ++i) v.at[i] = static_cast<float>(a.at[i]);
    return v;
  }
  // Adding 1.5 * 2**23 leaves the integer, rounded half to even, in the low bits.
  static Ints round(Floats x) {
    Ints v;
    for (int i = 0; i < 4; ++i) {
      const float shifted = x.at[i] + 12582912.0f;
      std::memcpy(&v.at[i], &shifted, 4);
      v.at[i] -= 0x4b400000;
    }
    return v;
  }

  static Floats sub(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] -= b.at[i];
    return a;
  }
  static Floats max(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
  }
  static Floats min(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
    return a;
  }
  static Floats mul_add(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
  static Floats divide(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] /= b.at[i];
    return a;
  }
  static float reduce_add(Floats a) { return (a.at[0] + a.at[2]) + (a.at[1] + a.at[3]); }
  static float reduce_max(Floats a) {
    float top = a.at[0];
    for (float v : a.at) top = v > top ? v : top;
    return top;
  }
  static Floats scale_by_power_of_2(Floats x, Ints n) {
    for (int i = 0; i < 4; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &x.at[i], 4);
      bits += static_cast<std::uint32_t>(n.at[i]) << 23;
      std::memcpy(&x.at[i], &bits, 4);
    }
    return x;
  }

  static Ints load_ints(const void* p) {
    Ints v;
    std::memcpy(v.at, p, 16);
    return v;
  }
  static void store_ints(void* p, Ints v) { std::memcpy(p, v.at, 16); }
  static Ints fill_int(std::int32_t x) { return {{x, x, x, x}}; }
  static Ints dot_pairs(Ints sum, Ints a, Ints b) {
    std::int16_t x[8], y[8];
    std::memcpy(x, a.at, 16);
    std::memcpy(y, b.at, 16);
    for (int i = 0; i < 4; ++i) sum.at[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sum;
  }
  static Ints join_words(Ints low, Ints high) {
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t bits = (static_cast<std::uint32_t>(low.at[i]) & 0xffff) | static_cast<std::uint32_t>(high.at[i]) << 16;
      low.at[i] = static_cast<std::int32_t>(bits);
    }
    return low;
  }
  static void store_words(std::int16_t* p, Ints a) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::int16_t>(a.at[i]);
  }
  static void store_codes(std::int8_t* p, Ints a) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<std::int8_t>(a.at[i]);
  }
};

}  // namespace

const Kernel* scalar_kernel() {
  static constexpr Kernel kernel = make_kernel<Scalar>("scalar");
  return &kernel;
}

}  // namespace hf_ternary
