// Numbers that are loaded and stored several at a time.
#pragma once

#include "compat.cuh"
#include "lane.h"

namespace implicit_steer::IST_ISA {

// N numbers that lie on a multiple of their size, at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Neighbours {
  T at[N];
};
// So many of a row of channels are worked on together: as many as there are registers for.
template <typename T>
constexpr int kTogether = sizeof(T) > 8 ? 2 : 4;

template <int N, typename T>
__device__ __forceinline__ Neighbours<T, N>& neighbours(T* first) {
  return *reinterpret_cast<Neighbours<T, N>*>(first);
}
template <int N, typename T>
__device__ __forceinline__ const Neighbours<T, N>& neighbours(const T* first) {
  return *reinterpret_cast<const Neighbours<T, N>*>(first);
}

// sum += factor · x, number by number. By value: what is passed is one load.
template <typename F, typename T, int N>
__device__ __forceinline__ void add_multiple(Neighbours<T, N>& sum, F factor, Neighbours<T, N> x) {
#pragma unroll
  for (int k = 0; k < N; ++k) sum.at[k] += factor * x.at[k];
}
template <typename T, int N>
__device__ __forceinline__ Neighbours<T, N> sum_of(Neighbours<T, N> x, Neighbours<T, N> y) {
#pragma unroll
  for (int k = 0; k < N; ++k) x.at[k] += y.at[k];
  return x;
}
template <typename T, int N>
__device__ __forceinline__ T dot(Neighbours<T, N> x, Neighbours<T, N> y) {
  T sum{};
#pragma unroll
  for (int k = 0; k < N; ++k) sum += x.at[k] * y.at[k];
  return sum;
}

}  // namespace implicit_steer::IST_ISA
