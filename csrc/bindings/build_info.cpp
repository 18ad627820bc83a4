// What this build is made of and what the machine can run. Facts only: nothing here computes. Two C functions of
// _ops.so, which _native.py calls through ctypes: they need neither torch nor a Python version.

#define EXPORT extern "C" __attribute__((visibility("default")))

// The widest instruction set of this machine among those that kernels are ever compiled for.
EXPORT const char* implicit_steer_cpu_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
  return "baseline";
}

#define TEXT(x) #x
#define NUMBER(x) TEXT(x)
#if defined(_OPENMP)
#define OPENMP NUMBER(_OPENMP)
#else
#define OPENMP
#endif

// Lines "name=value". Instruction sets and CUDA architectures are separated by spaces; none of the latter: no CUDA
// kernels. openmp: the date of the standard, empty without.
EXPORT const char* implicit_steer_build_facts() {
  return "version=" IMPLICIT_STEER_VERSION "\ncompiler=" IMPLICIT_STEER_COMPILER "\nflags=" IMPLICIT_STEER_FLAGS
         "\nbuild_type=" IMPLICIT_STEER_BUILD_TYPE "\nopenmp=" OPENMP "\ntorch=" IMPLICIT_STEER_TORCH
         "\ninstruction_sets=" IMPLICIT_STEER_INSTRUCTION_SETS
         "\ncuda_architectures=" IMPLICIT_STEER_CUDA_ARCHITECTURES;
}
