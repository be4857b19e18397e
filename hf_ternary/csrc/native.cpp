// The Python module hf_ternary._native: raw addresses in, nothing of torch or numpy. Callers check shapes and dtypes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hf_ternary;

namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernel& usable_kernel(const std::string& name) {
  for (const Backend& backend : backends()) {
    if (backend.kernel->name == name && backend.missing.empty()) return *backend.kernel;
  }
  throw nb::value_error(("backend '" + name + "' cannot run here").c_str());
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // weights kept in a cache live until the process ends

  m.def(
      "backends",
      [] {
        nb::dict found;
        for (const Backend& backend : backends()) found[backend.kernel->name] = backend.missing;
        return found;
      },
      "Kernels of this build, fastest first: name -> what this CPU lacks to run it ('' if nothing).");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that matter to the kernels.");

  nb::class_<PackedWeight>(m, "PackedWeight", "A ternary weight in the memory layout of one kernel.")
      .def(
          "__init__",
          [](PackedWeight* self, const std::string& backend, std::uintptr_t codes, std::uintptr_t scale, std::int64_t outputs,
             std::int64_t inputs, std::int64_t groups) {
            const Kernel& kernel = usable_kernel(backend);
            nb::gil_scoped_release release;
            new (self) PackedWeight(kernel, at<const std::uint8_t>(codes), at<const float>(scale), outputs, inputs, groups);
          },
          "backend"_a, "codes"_a, "scale"_a, "outputs"_a, "inputs"_a, "groups"_a,
          "Addresses of codes uint8 [outputs, ceil(inputs / 4)] and scale float32 [outputs, groups], both dense.");

  m.def(
      "linear",
      [](const PackedWeight& weight, std::uintptr_t x, std::int64_t rows, std::uintptr_t bias, std::uintptr_t y, int threads) {
        linear(weight, at<const float>(x), rows, at<const float>(bias), at<float>(y), threads);
      },
      "weight"_a, "x"_a, "rows"_a, "bias"_a, "y"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>(),
      "y[rows, outputs] = linear(x[rows, inputs]); addresses of dense float32 memory, bias may be 0.");
}
