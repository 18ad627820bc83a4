// Numbers of a warp's other lanes, and sums over lanes. All lanes of the warp must be here.
#pragma once

#include "../dual.h"
#include "compat.cuh"
#include "lane.h"

namespace implicit_steer::IST_ISA {

constexpr unsigned kWarp = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T from_lane(T x, int lane) {
  return __shfl_sync(kWarp, x, lane);
}
template <typename T>
__device__ __forceinline__ Dual<T> from_lane(Dual<T> x, int lane) {
  return {from_lane(x.value, lane), from_lane(x.tangent, lane)};
}
template <typename T>
__device__ __forceinline__ T from_lane_xor(T x, int bits) {
  return __shfl_xor_sync(kWarp, x, bits);
}
template <typename T>
__device__ __forceinline__ Dual<T> from_lane_xor(Dual<T> x, int bits) {
  return {from_lane_xor(x.value, bits), from_lane_xor(x.tangent, bits)};
}

// Sum over the lanes whose numbers differ in the bits from `low` up to, not including, `high`.
template <typename T>
__device__ __forceinline__ T sum_lanes(T x, int low, int high) {
  for (int bit = low; bit < high; bit *= 2) x += from_lane_xor(x, bit);
  return x;
}

// The smallest power of two that is at least n, at most 32: so many lanes stand side by side in a row of n.
__device__ __forceinline__ int row_width(int n) { return n <= 1 ? 1 : n > 16 ? 32 : 1 << (32 - __clz(n - 1)); }

// The last i from `low` on, below `end`, with start(i) <= at, where `low` has it; start ascends. Steps that double,
// then halve: `low` is near.
template <typename Start>
__device__ __forceinline__ int64_t last_start(int64_t low, int64_t end, int64_t at, Start start) {
  int64_t step = 1;
  const auto starts = [&](int64_t i) { return i < end && start(i) <= at; };
  for (; starts(low + step); step *= 2) low += step;
  for (; step > 1; step /= 2)
    if (starts(low + step / 2)) low += step / 2;
  return low;
}

}  // namespace implicit_steer::IST_ISA
