// What happens to a row of activations between two products, written once over an `Isa` (see tile.h).
//
// Every function walks a row that lies in the L1 cache, in vectors from the left: the order of a sum depends on the length
// of the row only, never on its neighbours.
#pragma once

#include "tile.h"

#if defined(_MSC_VER) && !defined(__clang__)
#ifdef _M_ARM64
#include <arm_neon.h>
#else
#include <intrin.h>
#endif
#endif

namespace hf_ternary {
namespace {

template <class Isa>
HF_TERNARY_INLINE void store_some(float* x, typename Isa::Floats v, std::int64_t count) {
  if (count >= Isa::kLanes) return Isa::store(x, v);
  float edge[Isa::kLanes];
  Isa::store(edge, v);
  std::memcpy(x, edge, count * sizeof(float));
}

constexpr float kLog2E = 1.44269504f;

// One instruction: std::sqrt may be an inline function that the linker shares with other files (see tile.h).
inline float square_root(float x) {
#if defined(_MSC_VER) && !defined(__clang__) && defined(_M_ARM64)
  return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0);
#elif defined(_MSC_VER) && !defined(__clang__)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}

template <class Isa>
void normalize(float* x, const float* y, std::int64_t rows, std::int64_t n, const Norm& norm, float* out) {
  const float count = static_cast<float>(n);
  for (std::int64_t r = 0; r < rows; ++r, x += n, out += n) {
    auto sum = Isa::fill(0.0f);
    for (std::int64_t k = 0; k < n; k += Isa::kLanes) {
      auto v = load_some<Isa>(x + k, n - k);
      if (y) {
        v = Isa::add(v, load_some<Isa>(y + k, n - k));
        store_some<Isa>(x + k, v, n - k);
      }
      sum = Isa::add(sum, v);
    }
    if (y) y += n;
    if (!norm.weight) {
      if (out != x) std::memcpy(out, x, n * sizeof(float));
      continue;
    }
    const auto mean = Isa::fill(Isa::reduce_add(sum) / count);
    auto squares = Isa::fill(0.0f);
    for (std::int64_t k = 0; k < n; k += Isa::kLanes) {
      auto v = Isa::sub(load_some<Isa>(x + k, n - k), mean);
      store_some<Isa>(out + k, v, n - k);
      if (n - k < Isa::kLanes) v = load_some<Isa>(out + k, n - k);  // lanes that do not exist hold -mean
      squares = Isa::mul_add(v, v, squares);
    }
    const auto inverse = Isa::fill(1.0f / square_root(Isa::reduce_add(squares) / count + norm.epsilon));
    for (std::int64_t k = 0; k < n; k += Isa::kLanes) {
      const auto v = Isa::mul(load_some<Isa>(out + k, n - k), inverse);
      const auto y_k = Isa::mul_add(v, load_some<Isa>(norm.weight + k, n - k), load_some<Isa>(norm.bias + k, n - k));
      store_some<Isa>(out + k, y_k, n - k);
    }
  }
}

// 2**x = 2**n * polynomial(x - n), n the integer next to x: minimax on [-1/2, 1/2], relative error below 3e-7, for x in
// [-126, 126]; NaN stays NaN.
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats power_of_2(typename Isa::Floats x) {
  const auto n = Isa::round(x);
  const auto f = Isa::sub(x, Isa::to_floats(n));
  auto p = Isa::fill(1.3276469e-3f);
  p = Isa::mul_add(p, f, Isa::fill(9.675541e-3f));
  p = Isa::mul_add(p, f, Isa::fill(5.5507135e-2f));
  p = Isa::mul_add(p, f, Isa::fill(2.402212e-1f));
  p = Isa::mul_add(p, f, Isa::fill(6.9314694e-1f));
  p = Isa::mul_add(p, f, Isa::fill(1.0000001f));
  return Isa::scale_by_power_of_2(p, n);
}

// exp(x), relative error below 1e-5; NaN stays NaN, below -87 it is 1e-38, above 87 8e37.
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats exponential(typename Isa::Floats x) {
  x = Isa::mul(x, Isa::fill(kLog2E));
  return power_of_2<Isa>(Isa::min(Isa::fill(126.0f), Isa::max(Isa::fill(-126.0f), x)));  // a NaN is the second operand
}

// x * Phi(x): Phi(x) - 1/2 is x times a polynomial in x**2, minimax on [-4.6, 4.6]. Absolute error below 2e-5, beyond 5 below
// 5e-6 |x|: little beside the int8 step that the row is rounded to.
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats gelu(typename Isa::Floats x) {
  constexpr float kCoefficients[] = {0.15354355f,   -0.07575745f, 0.05413157f,   -0.04058561f,  0.029565025f,
                                     -0.019155668f, 0.010870413f, -0.007624023f, 0.0056697438f, -0.0019628096f};
  const auto z = Isa::min(Isa::fill(4.6f), Isa::max(Isa::fill(-4.6f), x));
  const auto u = Isa::mul_add(Isa::mul(z, z), Isa::fill(0.09451796f), Isa::fill(-1.0f));
  auto p = Isa::fill(kCoefficients[9]);
  HF_TERNARY_UNROLL
  for (int i = 8; i >= 0; --i) p = Isa::mul_add(p, u, Isa::fill(kCoefficients[i]));
  return Isa::mul(x, Isa::mul_add(p, z, Isa::fill(0.5f)));
}

// x / 2 * (1 + tanh(y)) = x * (1 - 1 / (exp(2y) + 1)),  y = sqrt(2 / pi) (x + 0.044715 x**3)
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats gelu_tanh(typename Isa::Floats x) {
  const auto one = Isa::fill(1.0f), square = Isa::mul(x, x);
  const auto twice = Isa::mul(x, Isa::mul_add(square, Isa::fill(0.0713548163f), Isa::fill(1.59576912f)));
  return Isa::mul(x, Isa::sub(one, Isa::divide(one, Isa::add(exponential<Isa>(twice), one))));
}

// x / (1 + exp(-steepness x)): SiLU, and CLIP's approximation of GELU
template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats silu(typename Isa::Floats x, float steepness) {
  return Isa::divide(x, Isa::add(exponential<Isa>(Isa::mul(x, Isa::fill(-steepness))), Isa::fill(1.0f)));
}

template <class Isa>
HF_TERNARY_INLINE typename Isa::Floats activated(Activation activation, typename Isa::Floats x) {
  switch (activation) {
    case Activation::gelu:
      return gelu<Isa>(x);
    case Activation::gelu_tanh:
      return gelu_tanh<Isa>(x);
    case Activation::quick_gelu:
      return silu<Isa>(x, 1.702f);
    case Activation::silu:
      return silu<Isa>(x, 1.0f);
    default:
      return Isa::max(Isa::fill(0.0f), x);  // relu
  }
}

template <class Isa>
void activate(Activation activation, bool gated, float* x, std::int64_t rows, std::int64_t n) {
  const float* from = x;
  for (std::int64_t r = 0; r < rows; ++r, x += n, from += gated ? 2 * n : n) {
    for (std::int64_t k = 0; k < n; k += Isa::kLanes) {
      auto v = activated<Isa>(activation, load_some<Isa>(from + k, n - k));
      if (gated) v = Isa::mul(v, load_some<Isa>(from + n + k, n - k));
      store_some<Isa>(x + k, v, n - k);
    }
  }
}

template <class Isa>
void rotate(float* qkv, std::int64_t rows, std::int64_t heads, std::int64_t head_dim, const float* rotation) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t r = 0; r < rows; ++r, qkv += 3 * heads * head_dim, rotation += head_dim) {
    for (float* x = qkv; x < qkv + 2 * heads * head_dim; x += head_dim) {
      for (std::int64_t k = 0; k < half; k += Isa::kLanes) {
        const auto cosine = load_some<Isa>(rotation + k, half - k), sine = load_some<Isa>(rotation + half + k, half - k);
        const auto left = load_some<Isa>(x + k, half - k), right = load_some<Isa>(x + half + k, half - k);
        store_some<Isa>(x + k, Isa::sub(Isa::mul(left, cosine), Isa::mul(right, sine)), half - k);
        store_some<Isa>(x + half + k, Isa::add(Isa::mul(right, cosine), Isa::mul(left, sine)), half - k);
      }
    }
  }
}

}  // namespace
}  // namespace hf_ternary
