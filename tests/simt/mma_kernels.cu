// One product of csrc/cuda/mma.cuh by one warp. mma_test runs these kernels in the emulator; `make cuda-gates` compiles
// them with nvcc and counts their tensor-core instructions.

#include "../../csrc/cuda/mma.cuh"
#include "mma_kernels.h"

namespace simt_test {

namespace {

using namespace implicit_steer::IST_ISA;

// x, which is finite, rounded to TF32 (ties away from 0), in the place of a float whose last 13 bits are 0
__device__ __forceinline__ uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// d += a b, all by rows. `missing`: a lane that takes no part, which is an error; 32: none.
template <Rounding kRounding>
__global__ void multiply_tf32(const float* a, const float* b, float* d, int missing) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float own[4], from_a[4], from_b[2];
  for (int i = 0; i < 4; ++i) own[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  for (int i = 0; i < 4; ++i) from_a[i] = a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) from_b[i] = b[(t + 4 * i) * 8 + g];
  if constexpr (kRounding == Rounding::kTf32) {
    uint32_t rounded_a[4], rounded_b[2];
    for (int i = 0; i < 4; ++i) rounded_a[i] = to_tf32(from_a[i]);
    for (int i = 0; i < 2; ++i) rounded_b[i] = to_tf32(from_b[i]);
    if (static_cast<int>(threadIdx.x) != missing) mma_m16n8k8(own, rounded_a, rounded_b);
  } else {
    Split<4> split_a;
    Split<2> split_b;
    for (int i = 0; i < 4; ++i) split_a.set(i, from_a[i]);
    for (int i = 0; i < 2; ++i) split_b.set(i, from_b[i]);
    if (static_cast<int>(threadIdx.x) != missing) mma_3xtf32(own, split_a, split_b);
  }
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = own[i];
}

}  // namespace

void multiply(Rounding rounding, const float* a, const float* b, float* d, int missing) {
  [[maybe_unused]] const char* const name = "multiply_tf32";  // for the emulator
  if (rounding == Rounding::kTf32)
    LAUNCH(multiply_tf32<Rounding::kTf32>, dim3(1), dim3(32), 0, cudaStream_t{}, a, b, d, missing);
  else
    LAUNCH(multiply_tf32<Rounding::k3xTf32>, dim3(1), dim3(32), 0, cudaStream_t{}, a, b, d, missing);
}

}  // namespace simt_test
