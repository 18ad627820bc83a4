// A call of the exact and the grid kernels.
#pragma once

#include "call.h"
#include "field_plan.h"

namespace implicit_steer::IST_ISA {

// ConvArgs.node_sums: four numbers of which the first, an integer, says how many edges a warp of the forward pass has;
// then the T of every node, as a warp's lanes put it aside (exact_warp.cuh), summed over the edges of one warp: node i
// and warp w have row i + w. So those of the warps that share a node follow each other.
constexpr int kInFrontOfNodeSums = 4;

struct FieldCall : Call<float> {
  FieldView view;
  float* sums;  // backward: of warps, [warps, size]: see exact_gradients.cuh
  // Of a forward pass that finishes its nodes itself; null where mean_and_bias follows:
  const float* bias;  // [C_out], what the output of every node gets
  int32_t* arrivals;  // [warps], 0 at first: of how many edges rows of `partial` have the sums, of a node that begins
                      // in this warp and goes on in others
};

}  // namespace implicit_steer::IST_ISA
