// Which kernels this build has and this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace hf_ternary {

struct Backend {
  const Kernel* kernel;
  std::string missing;   // what the CPU lacks to run it; empty: usable
};

// Every kernel of this build, fastest first.
const std::vector<Backend>& backends();

// Whether unpacking a strip before many rows use it beats unpacking in registers. It does where shifts and masks take slots
// from dot products, that is on all but AMD's CPUs, which run them on vector units of their own.
bool unpacking_pays();

// Instruction sets of this CPU that matter to the kernels.
std::vector<std::string> cpu_features();

}  // namespace hf_ternary
