// The Python module hf_ternary._native: raw addresses in, nothing of torch or numpy. Callers check shapes and dtypes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "encoder.h"
#include "linear.h"
#include "thread_pool.h"

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

// (codes, scale, bias, outputs, inputs, groups)
using LinearTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;
LinearSource linear_source(const LinearTuple& t) {
  return {at<const std::uint8_t>(std::get<0>(t)), at<const float>(std::get<1>(t)), at<const float>(std::get<2>(t)),
          std::get<3>(t), std::get<4>(t), std::get<5>(t)};
}

// (weight, bias)
using NormTuple = std::tuple<std::uintptr_t, std::uintptr_t>;
NormSource norm_source(const NormTuple& t) { return {at<const float>(std::get<0>(t)), at<const float>(std::get<1>(t))}; }

// (codes, scale, rows, groups, bits)
using TableTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, int>;
Table table(const TableTuple& t) {
  return {at<const void>(std::get<0>(t)), at<const float>(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

Activation activation(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  if (name == "silu") return Activation::silu;
  if (name == "relu") return Activation::relu;
  throw nb::value_error(("activation '" + name + "' is unknown").c_str());
}

Pooling pooling(const std::string& name) {
  if (name == "mean") return Pooling::mean;
  if (name == "first") return Pooling::first;
  throw nb::value_error(("pooling '" + name + "' is unknown").c_str());
}

bool all_fit(const Encoder& encoder, const std::vector<Sequence>& sequences) {
  for (const Sequence& sequence : sequences) {
    if (!encoder.fits(sequence)) return false;
  }
  return true;
}

// The run of ones in a row of a mask; an empty one if there is another thing in it.
std::pair<std::int64_t, std::int64_t> find_run(const std::int64_t* mask, std::int64_t columns) {
  std::int64_t begin = 0, end = columns;
  while (begin < end && mask[begin] == 0) ++begin;
  while (end > begin && mask[end - 1] == 0) --end;
  for (std::int64_t c = begin; c < end; ++c) {
    if (mask[c] != 1) return {0, 0};
  }
  return {begin, end};
}

// ids, types and mask int64 [rows, columns], the last two may be null; or states float32 [rows, columns, hidden] instead of ids
// and types; y float32 [rows, columns, hidden], zero where masked.
// False, and y unwritten: an id out of range, an empty row, or a mask that is no run of ones in each row.
bool hidden_states(const Encoder& encoder, const std::int64_t* ids, const std::int64_t* types, const float* states,
                   const std::int64_t* mask, std::int64_t rows, std::int64_t columns, float* y, int threads) {
  const std::int64_t hidden = encoder.hidden();
  std::vector<Sequence> sequences;
  sequences.reserve(rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = r * columns;
    const auto [begin, end] = mask ? find_run(mask + row, columns) : std::pair<std::int64_t, std::int64_t>(0, columns);
    if (begin == end) return false;
    sequences.push_back({ids ? ids + row : nullptr, types ? types + row : nullptr,
                         states ? states + (row + begin) * hidden : nullptr, begin, end - begin, y + (row + begin) * hidden});
  }
  if (!all_fit(encoder, sequences)) return false;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Sequence& s = sequences[r];
    std::fill(y + r * columns * hidden, s.out, 0.0f);
    std::fill(s.out + s.length * hidden, y + (r + 1) * columns * hidden, 0.0f);
  }
  encoder.run(sequences, Pooling::none, false, threads);
  return true;
}

// y float32 [ids.size(), hidden]; false, and y unwritten: an id out of range, or a sequence without any.
bool embeddings(const Encoder& encoder, const std::vector<std::vector<std::int64_t>>& ids, Pooling how, bool normalize,
                float* y, int threads) {
  std::vector<Sequence> sequences;
  sequences.reserve(ids.size());
  for (const std::vector<std::int64_t>& row : ids) {
    if (row.empty()) return false;
    sequences.push_back({row.data(), nullptr, nullptr, 0, static_cast<std::int64_t>(row.size()), y});
    y += encoder.hidden();
  }
  if (!all_fit(encoder, sequences)) return false;
  encoder.run(sequences, how, normalize, threads);
  return true;
}

}  // namespace

NB_MODULE(_native, m) {
  ThreadPool::instance();         // from now on it notices a fork
  nb::set_leak_warnings(false);  // weights kept in a cache live until the process ends

  m.def(
      "backends",
      [] {
        nb::dict found;
        for (const Backend& backend : backends()) found[backend.kernel->name] = backend.missing;
        return found;
      },
      "Kernels of this build, fastest first: name -> what this CPU lacks to run it ('' if nothing).");
  m.def(
      "share_openmp",
      [](std::uintptr_t gomp_parallel, std::uintptr_t omp_get_thread_num) {
        ThreadPool::share({reinterpret_cast<decltype(ThreadPool::OpenMp::parallel)>(gomp_parallel),
                           reinterpret_cast<decltype(ThreadPool::OpenMp::thread_number)>(omp_get_thread_num)});
      },
      "gomp_parallel"_a, "omp_get_thread_num"_a,
      "Use the threads of the OpenMP runtime that has these functions at these addresses (0: threads of our own).");
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

  nb::class_<Encoder>(m, "Encoder", "A transformer encoder with ternary layers; see encoder.h. Arguments are addresses.")
      .def(
          "__init__",
          [](Encoder* self, const std::string& backend, std::int64_t hidden, std::int64_t heads, std::int64_t intermediate,
             const std::string& act, bool gated, bool pre_norm, float epsilon, std::int64_t padding_id,
             const TableTuple& tokens, const TableTuple& positions, const TableTuple& types, const NormTuple& norm,
             const NormTuple& first_norm, std::uintptr_t bias, std::int64_t reach) {
            new (self) Encoder(usable_kernel(backend),
                               {hidden, heads, intermediate, activation(act), gated, pre_norm, epsilon, padding_id,
                                table(tokens), table(positions), table(types), norm_source(norm), norm_source(first_norm),
                                at<const float>(bias), reach});
          },
          "backend"_a, "hidden"_a, "heads"_a, "intermediate"_a, "activation"_a, "gated"_a, "pre_norm"_a, "epsilon"_a,
          "padding_id"_a, "tokens"_a, "positions"_a, "types"_a, "norm"_a, "first_norm"_a, "bias"_a, "reach"_a)
      .def(
          "add_layer",
          [](Encoder& self, const LinearTuple& qkv, const LinearTuple& out, const LinearTuple& up, const LinearTuple& down,
             const NormTuple& attention_norm, const NormTuple& output_norm, std::int64_t before, std::int64_t after,
             std::uintptr_t rotation) {
            nb::gil_scoped_release release;
            self.add_layer({linear_source(qkv), linear_source(out), linear_source(up), linear_source(down),
                            norm_source(attention_norm), norm_source(output_norm), {before, after},
                            at<const float>(rotation)});
          },
          "qkv"_a, "out"_a, "up"_a, "down"_a, "attention_norm"_a, "output_norm"_a, "before"_a, "after"_a, "rotation"_a)
      .def(
          "hidden_states",
          [](const Encoder& self, std::uintptr_t ids, std::uintptr_t types, std::uintptr_t states, std::uintptr_t mask,
             std::int64_t rows, std::int64_t columns, std::uintptr_t y, int threads) {
            return hidden_states(self, at<const std::int64_t>(ids), at<const std::int64_t>(types), at<const float>(states),
                                 at<const std::int64_t>(mask), rows, columns, at<float>(y), threads);
          },
          nb::call_guard<nb::gil_scoped_release>(), "ids"_a, "types"_a, "states"_a, "mask"_a, "rows"_a, "columns"_a, "y"_a,
          "threads"_a)
      .def(
          "embeddings",
          [](const Encoder& self, const std::vector<std::vector<std::int64_t>>& ids, const std::string& how, bool normalize,
             std::uintptr_t y, int threads) {
            return embeddings(self, ids, pooling(how), normalize, at<float>(y), threads);
          },
          nb::call_guard<nb::gil_scoped_release>(), "ids"_a, "pooling"_a, "normalize"_a, "y"_a, "threads"_a);
}
