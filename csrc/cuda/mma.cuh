// Products of small matrices by the tensor cores of a warp: D += A B, A [16, 8], B [8, 8], D [16, 8].
//
// Every lane holds a fragment of each. With g = lane / 4 and t = lane % 4:
//
//   a[i] = A[g + 8 (i % 2)][t + 4 (i / 2)],   b[i] = B[t + 4 i][g],   d[i] = D[g + 8 (i / 2)][2 t + i % 2]
//
// Tensor cores read A and B as TF32 numbers, of 11 bits of mantissa: a product of random matrices has a relative error
// of 2.4e-4. 3xTF32 splits every element into the sum of two TF32 numbers and adds three products: 2.9e-7.
#pragma once

#include "../dual.h"
#include "compat.cuh"

namespace implicit_steer::IST_ISA {

// The mask of TF32 numbers, unknown to the compiler. Where it knows that tensor cores do not read what is cut off, it
// passes x itself, and moves it into the fragment's registers before each product; with this mask the big part is made
// there, which takes registers for both.
__device__ __forceinline__ uint32_t opaque_mask() { return 0 - (uint32_t{blockDim.z} << 13); }

// The elements of a fragment of n as sums of two TF32 numbers. Cutting the last 13 bits takes 2 instructions where two
// roundings take 7, and loses less than 2^-21 of x. An infinite x becomes NaN.
template <int n>
struct Split {
  uint32_t big[n], small[n];
  __device__ __forceinline__ void set(int i, float x) {
    big[i] = __float_as_uint(x) & 0xffffe000u;
    small[i] = __float_as_uint(x - __uint_as_float(big[i]));
  }
  // For fragments of several products.
  __device__ __forceinline__ void place(int i, float x) {
    big[i] = __float_as_uint(x) & opaque_mask();
    small[i] = __float_as_uint(x - __uint_as_float(big[i]));
  }
};

// D += A B by 3xTF32, the small products first. All lanes of the warp must be here.
__device__ __forceinline__ void mma_3xtf32(float (&d)[4], const Split<4>& a, const Split<2>& b) {
  mma_m16n8k8(d, a.small, b.big);
  mma_m16n8k8(d, a.big, b.small);
  mma_m16n8k8(d, a.big, b.big);
}

// The same of several A and one B, in turn: each waits for its own last product only.
template <int n>
__device__ __forceinline__ void mma_3xtf32(float (&d)[n][4], const Split<4> (&a)[n], const Split<2>& b) {
#pragma unroll
  for (int k = 0; k < n; ++k) mma_m16n8k8(d[k], a[k].small, b.big);
#pragma unroll
  for (int k = 0; k < n; ++k) mma_m16n8k8(d[k], a[k].big, b.small);
#pragma unroll
  for (int k = 0; k < n; ++k) mma_m16n8k8(d[k], a[k].big, b.big);
}

// A matrix A of 8 rows as one of 16: the big parts of its elements above the small ones. Its fragment has the elements
// A[g][t] and A[g][t + 4], in this order.
struct Stacked {
  uint32_t of[4];
  __device__ __forceinline__ void set(int i, float x) {
    of[2 * i] = __float_as_uint(x) & 0xffffe000u;
    of[2 * i + 1] = __float_as_uint(x - __uint_as_float(of[2 * i]));
  }
  __device__ __forceinline__ void place(int i, float x) {
    of[2 * i] = __float_as_uint(x) & opaque_mask();
    of[2 * i + 1] = __float_as_uint(x - __uint_as_float(of[2 * i]));
  }
};
// D += A B by 3xTF32 in two instructions: D[g][2 t + i] is the sum of d[i] and d[2 + i].
__device__ __forceinline__ void mma_stacked(float (&d)[4], const Stacked& a, const Split<2>& b) {
  mma_m16n8k8(d, a.of, b.small);
  mma_m16n8k8(d, a.of, b.big);
}

// ---- of numbers N, float or dual: a fragment of the values, and one of the tangents

template <typename Fragment, typename N>
struct OfParts {
  Fragment value;
  __device__ __forceinline__ void set(int i, float x) { value.set(i, x); }
};
template <typename Fragment>
struct OfParts<Fragment, Dual<float>> {
  Fragment value, tangent;
  __device__ __forceinline__ void set(int i, Dual<float> x) { value.set(i, x.value), tangent.set(i, x.tangent); }
};

// D, to which add() adds A B. `tangents_only`: what its value is does not matter.
template <typename N>
struct ProductSum {
  float value[4] = {};
  __device__ __forceinline__ void add(const OfParts<Split<4>, N>& a, const OfParts<Split<2>, N>& b, bool = false) {
    mma_3xtf32(value, a.value, b.value);
  }
  __device__ __forceinline__ float operator[](int i) const { return value[i]; }
};
template <>
struct ProductSum<Dual<float>> {
  using N = Dual<float>;
  float value[4] = {}, tangent[4] = {};
  __device__ __forceinline__ void add(const OfParts<Split<4>, N>& a, const OfParts<Split<2>, N>& b,
                                      bool tangents_only = false) {
    mma_3xtf32(tangent, a.tangent, b.value);
    if (!tangents_only) mma_3xtf32(value, a.value, b.value);
    mma_3xtf32(tangent, a.value, b.tangent);
  }
  __device__ __forceinline__ N operator[](int i) const { return {value[i], tangent[i]}; }
};

// The same with Stacked: its number i is D[g][2 t + i].
template <typename N>
struct StackedSum {
  float value[4] = {};
  __device__ __forceinline__ void add(const OfParts<Stacked, N>& a, const OfParts<Split<2>, N>& b) {
    mma_stacked(value, a.value, b.value);
  }
  __device__ __forceinline__ float operator[](int i) const { return value[i] + value[2 + i]; }
};
template <>
struct StackedSum<Dual<float>> {
  using N = Dual<float>;
  float value[4] = {}, tangent[4] = {};
  __device__ __forceinline__ void add(const OfParts<Stacked, N>& a, const OfParts<Split<2>, N>& b) {
    mma_stacked(tangent, a.tangent, b.value);
    mma_stacked(value, a.value, b.value);
    mma_stacked(tangent, a.value, b.tangent);
  }
  __device__ __forceinline__ N operator[](int i) const {
    return {value[i] + value[2 + i], tangent[i] + tangent[2 + i]};
  }
};

}  // namespace implicit_steer::IST_ISA
