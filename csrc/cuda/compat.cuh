// All that is not plain CUDA C++: launches, dynamic shared memory, PTX. Under nvcc as here; the tests compile the same
// kernels for the processor, where tests/simt/simt.h gives these words their meaning.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define SHARED_MEMORY(T, name)                                   \
  extern __shared__ __align__(16) unsigned char shared_memory[]; \
  T* const name = reinterpret_cast<T*>(shared_memory)

// 2^x, at most 2 ulp; 0 for results that are not normal
__host__ __device__ __forceinline__ float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// A pointer that was read from memory, for the compiler to know that it leads to global memory.
template <typename T>
__device__ __forceinline__ T* global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
#else
#include "simt.h"
#endif
