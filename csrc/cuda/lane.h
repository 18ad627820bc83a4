// Lanes of a GPU thread: one number each, V = float or double. What simd.h is on processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "compat.cuh"

#define IST_INLINE __host__ __device__ __forceinline__
#define IST_LANES IST_INLINE
#if defined(__CUDACC__)
#define IST_ROLLED _Pragma("unroll 1")
#define IST_UNROLLED _Pragma("unroll")
#else
#define IST_ROLLED
#define IST_UNROLLED
#endif

namespace implicit_steer::IST_ISA {

constexpr bool kOneLane = true;  // of a type that is a plain number
// Rows of samples at a time (edge_mlp.h): as many as the registers hold.
template <typename V>
constexpr int kRowBlock = sizeof(V) <= 4   ? 4
                          : sizeof(V) <= 8 ? 2
                                           : 1;

template <typename R>
struct Lane {
  using V = R;
  using Q = R;
  static constexpr int L = 1, QL = 1;
};

// a where the mask is set, else b
template <typename M, typename V>
IST_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <typename V, typename R>
IST_INLINE V splat(R value) {
  return value;
}
IST_INLINE float lane_sqrt(float x) { return sqrtf(x); }
IST_INLINE double lane_sqrt(double x) { return sqrt(x); }
// The second operand where either is NaN.
template <typename V>
IST_INLINE V lane_max(V bound, V x) {
  return bound > x ? bound : x;
}
template <typename V>
IST_INLINE V lane_min(V bound, V x) {
  return bound < x ? bound : x;
}
template <typename V>
IST_INLINE V lane_abs(V x) {
  return x < 0 ? -x : x;
}
template <typename V>
IST_INLINE V lane_sum(V x) {
  return x;
}

// e^x without a bound: infinite above 88.7, 0 below -87.3
IST_INLINE float exp_unbounded(float x) { return exp2_approximate(x * 1.44269504089f); }

// e^x; arguments above 88 (float) and 709 (double) count as these, so that derivatives stay finite.
IST_INLINE float lane_exp(float x) { return exp_unbounded(lane_min(88.0f, x)); }
IST_INLINE double lane_exp(double x) { return exp(lane_min(709.0, x)); }
// x where x > 0, else e^x - 1: near 0 by the series, which keeps the digits that e^x - 1 would lose; its error is 1e-7
// of the result at -0.35.
IST_INLINE float lane_elu(float x) {
  const float exp = exp_unbounded(x);
  float series = 1 / 720.0f;
  series = series * x + 1 / 120.0f;
  series = series * x + 1 / 24.0f;
  series = series * x + 1 / 6.0f;
  series = series * x + 0.5f;
  series = series * x + 1;
  const float below = x > -0.35f ? series * x : exp - 1;
  return x > 0 ? x : below;
}
IST_INLINE double lane_elu(double x) {
  const double below = expm1(x);
  return x > 0 ? x : below;
}
IST_INLINE float lane_erf(float x) { return erff(x); }
IST_INLINE double lane_erf(double x) { return erf(x); }

}  // namespace implicit_steer::IST_ISA
