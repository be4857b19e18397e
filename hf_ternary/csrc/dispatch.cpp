// The CPU is asked once, at run time, so that one binary serves every machine of its architecture.
#include "dispatch.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define HF_TERNARY_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hf_ternary {
namespace {

struct Feature {
  const char* name;
  bool present;
};

#ifdef HF_TERNARY_X86

struct Registers {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#ifdef _MSC_VER
  __cpuidex(reinterpret_cast<int*>(&r), static_cast<int>(leaf), static_cast<int>(subleaf));
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
#endif
  return r;
}

// XCR0: the registers that the operating system saves.
std::uint64_t saved_registers() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
#endif
}

bool is_amd() { return cpuid(0, 0).b == 0x68747541; }  // "Auth" of "AuthenticAMD"

std::vector<Feature> detect() {
  const auto bit = [](std::uint32_t word, int index) { return (word >> index & 1) != 0; };
  const std::uint32_t highest = cpuid(0, 0).a;
  const Registers one = cpuid(1, 0), seven = highest >= 7 ? cpuid(7, 0) : Registers{};
  const Registers seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
  const std::uint64_t saved = bit(one.c, 27) ? saved_registers() : 0;
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
  return {
      {"avx2", ymm && bit(seven.b, 5)},
      {"avxvnni", ymm && bit(seven_one.a, 4)},
      {"avx512f", zmm && bit(seven.b, 16)},
      {"avx512bw", zmm && bit(seven.b, 30)},
      {"avx512vl", zmm && bit(seven.b, 31)},
      {"avx512vnni", zmm && bit(seven.c, 11)},
  };
}

#elif defined(__aarch64__)

bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}

bool is_amd() { return false; }

std::vector<Feature> detect() { return {{"asimddp", has_dot_product()}}; }

#else

bool is_amd() { return false; }

std::vector<Feature> detect() { return {}; }

#endif

const std::vector<Feature>& features() {
  static const std::vector<Feature> found = detect();
  return found;
}

std::string missing(std::initializer_list<const char*> needed) {
  std::string list;
  for (const std::string name : needed) {
    for (const Feature& feature : features()) {
      if (name == feature.name && !feature.present) list += (list.empty() ? "" : ", ") + name;
    }
  }
  return list;
}

std::vector<Backend> find() {
  std::vector<Backend> found;
  const auto add = [&](const Kernel* kernel, std::initializer_list<const char*> needed) {
    if (kernel) found.push_back({kernel, missing(needed)});
  };
  add(avx512vnni_kernel(), {"avx512f", "avx512bw", "avx512vl", "avx512vnni"});
  add(avxvnni_kernel(), {"avx2", "avxvnni"});
  add(avx2_kernel(), {"avx2"});
  add(neon_kernel(), {"asimddp"});
  add(scalar_kernel(), {});
  return found;
}

}  // namespace

const std::vector<Backend>& backends() {
  static const std::vector<Backend> found = find();
  return found;
}

bool unpacking_pays() {
  static const bool pays = !is_amd();
  return pays;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const Feature& feature : features()) {
    if (feature.present) names.emplace_back(feature.name);
  }
  return names;
}

}  // namespace hf_ternary
