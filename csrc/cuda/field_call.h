// A call of the exact and the grid kernels.
#pragma once

#include "call.h"
#include "field_plan.h"

namespace implicit_steer::IST_ISA {

struct FieldCall : Call<float> {
  FieldView view;
  float* sums;  // backward: of warps, [warps, size]: see exact_gradients.cuh
  // Of a forward pass that finishes its nodes itself; null where mean_and_bias follows:
  const float* bias;  // [C_out], what the output of every node gets
  int32_t* arrivals;  // [warps], 0 at first: of how many edges rows of `partial` have the sums, of a node that begins
                      // in this warp and goes on in others
};

}  // namespace implicit_steer::IST_ISA
