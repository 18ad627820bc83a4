// The arithmetic peak of one thread: multiply-adds on independent accumulators in the widest vectors.
#pragma once

#include "../simd.h"

namespace implicit_steer::IST_ISA {

// Latency times issue width is 8 to 10 vectors on current processors, and 16 registers hold 12 with two operands.
constexpr int kAccumulators = 12;

// `rounds` multiply-adds on every lane of every accumulator; their sum, so that none can be left out.
template <typename R>
R multiply_adds(int64_t rounds) {
  using V = typename Lane<R>::V;
  const V factor = splat<V>(R(0.75)), term = splat<V>(R(0.25));  // fixed point 1: neither overflow nor denormals
  V sums[kAccumulators];
  for (int k = 0; k < kAccumulators; ++k) sums[k] = splat<V>(R(k));  // different, or they would be computed once
  for (int64_t n = 0; n < rounds; ++n)
    for (int k = 0; k < kAccumulators; ++k) sums[k] = sums[k] * factor + term;
  for (int k = 1; k < kAccumulators; ++k) sums[0] += sums[k];
  return lane_sum(sums[0]);
}

}  // namespace implicit_steer::IST_ISA
