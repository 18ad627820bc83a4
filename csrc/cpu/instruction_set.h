// The choice of the instruction set at run time. No torch.
#pragma once

namespace implicit_steer {

// The widest set that this build and this machine have: 1 baseline, 2 AVX2, 3 AVX-512.
inline int widest_instruction_set() {
#if defined(IST_HAVE_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : 2;
#else
  return 1;
#endif
}

// The object `name` of the set `isa`; only those that CMake compiles exist.
#if defined(IST_HAVE_X86)
#define IST_TABLE(isa, name) (isa == 3 ? avx512::name : isa == 2 ? avx2::name : baseline::name)
#else
#define IST_TABLE(isa, name) baseline::name
#endif

}  // namespace implicit_steer
