// Checks the error bounds that rows.h states of its activations, with every kernel of a build that this CPU can run, against
// the C library in double. Called by kernel_check.cpp.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "dispatch.h"

using namespace hf_ternary;

namespace {

struct Case {
  const char* name;
  Activation activation;
  double (*exact)(double x);
  double absolute, relative, of_x;  // the error allowed: absolute + relative * |exact| + of_x * |x|
};

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2.0))); }
double gelu_tanh(double x) {
  const double pi = std::acos(-1.0);
  return x / 2 * (1 + std::tanh(std::sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
}
double quick_gelu(double x) { return x / (1 + std::exp(-1.702 * x)); }
double relu(double x) { return x > 0 ? x : 0; }

// A relative error of 1e-5 in exp() is one of silu() at most.
const Case kCases[] = {{"silu", Activation::silu, silu, 1e-36, 1.1e-5, 0},
                       {"quick_gelu", Activation::quick_gelu, quick_gelu, 1e-36, 1.1e-5, 0},
                       {"gelu_tanh", Activation::gelu_tanh, gelu_tanh, 0, 1e-6, 1e-6},  // 1 - (nearly 1) leaves an absolute error
                       {"gelu", Activation::gelu, gelu, 2e-5, 0, 0},
                       {"relu", Activation::relu, relu, 0, 0, 0}};

}  // namespace

bool activations_are_accurate() {
  std::vector<float> inputs;
  for (int i = -400000; i <= 400000; ++i) inputs.push_back(static_cast<float>(i) * 1e-4f);
  bool good = true;
  for (const Backend& backend : backends()) {
    if (!backend.missing.empty()) continue;
    for (const Case& c : kCases) {
      std::vector<float> y = inputs;
      backend.kernel->activate(c.activation, false, y.data(), 1, static_cast<std::int64_t>(y.size()));
      double worst = 0;
      float at = 0;
      for (std::size_t i = 0; i < y.size(); ++i) {
        const double x = inputs[i], exact = c.exact(x);
        const bool tail = c.activation == Activation::gelu && std::fabs(x) > 5;
        const double allowed = tail ? 5e-6 * std::fabs(x) : c.absolute + c.relative * std::fabs(exact) + c.of_x * std::fabs(x);
        const double error = std::fabs(y[i] - exact);
        if (!(error <= allowed) && !(error - allowed <= worst)) worst = error - allowed, at = inputs[i];
      }
      float nan = std::numeric_limits<float>::quiet_NaN();
      backend.kernel->activate(c.activation, false, &nan, 1, 1);
      if (worst > 0) std::printf("%s: %s(%.9g) is %.3g beyond its error\n", backend.kernel->name, c.name, at, worst);
      if (!std::isnan(nan)) std::printf("%s: %s(NaN) is %.9g\n", backend.kernel->name, c.name, nan);
      good = good && worst == 0 && std::isnan(nan);
    }
  }
  return good;
}
