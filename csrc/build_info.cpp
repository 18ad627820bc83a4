// What this build is made of and what the machine can run. Facts only: nothing here computes.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// The widest instruction set of this machine among those that kernels are ever compiled for.
const char* cpu_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
  return "baseline";
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = IMPLICIT_STEER_VERSION;
  facts["compiler"] = IMPLICIT_STEER_COMPILER;
  facts["flags"] = IMPLICIT_STEER_FLAGS;
  facts["build_type"] = IMPLICIT_STEER_BUILD_TYPE;
#if defined(_OPENMP)
  facts["openmp"] = _OPENMP;
#else
  facts["openmp"] = py::none();
#endif
  facts["torch"] = IMPLICIT_STEER_TORCH;
  facts["instruction_sets"] = IMPLICIT_STEER_INSTRUCTION_SETS;      // separated by spaces
  facts["cuda_architectures"] = IMPLICIT_STEER_CUDA_ARCHITECTURES;  // separated by spaces; empty: no CUDA kernels
  return facts;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Build facts of the native extension and the instruction set of this machine.";
  m.def("build_facts", &build_facts, "Compiler, flags, OpenMP version date, torch headers, compiled targets.");
  m.def("cpu_instruction_set", &cpu_instruction_set, "'AVX-512', 'AVX2' or 'baseline': what this machine runs.");
}
