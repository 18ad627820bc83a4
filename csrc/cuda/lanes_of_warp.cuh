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

}  // namespace implicit_steer::IST_ISA
