// All that is not plain CUDA C++: launches, dynamic shared memory, PTX. Under nvcc as here; the tests compile the same
// kernels for the processor, where tests/simt/simt.h gives these words their meaning.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <cstdint>

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
// 1 / x and 1 / sqrt(x), at most 2 ulp; numbers that are not normal count as 0
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root_approximate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The smaller one; NaN where either is
__device__ __forceinline__ float min_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// The pointer, about which the compiler knows nothing any more: loads by it are not moved out of a loop, where they
// would take registers.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  unsigned zero = 0;
  asm volatile("" : "+r"(zero));
  return pointer + zero;
}
// blockDim.x and threadIdx.x, read anew: the compiler cannot keep what it makes of them in registers.
__device__ __forceinline__ unsigned block_threads() {
  unsigned n;
  asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(n));
  return n;
}
__device__ __forceinline__ unsigned thread_of_block() {
  unsigned n;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(n));
  return n;
}
// D += A B by a warp, all of whose lanes are here; mma.cuh says which lane holds what. The last 13 bits of the elements
// of A and B are not read.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A pointer that was read from memory, for the compiler to know that it leads to global memory.
template <typename T>
__device__ __forceinline__ T* global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
// Where a row of n numbers begins. The compiler takes the product apart where it cannot see that n has 32 bits.
__device__ __forceinline__ const float* row_of(const float* rows, int row, int n) {
  int64_t bytes;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(row), "r"(4 * n));
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(rows) + bytes);
}
#else
#include "simt.h"
#endif
