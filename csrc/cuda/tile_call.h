// A call of the kernels of tile_sums.cuh and tile_backward.cuh, and what their blocks have in common.
#pragma once

#include "tile_plan.h"
#include "wide_call.h"

namespace implicit_steer::IST_ISA {

constexpr int kTileWarps = TilePlan::kWarps, kTileThreads = 32 * kTileWarps;  // of a block

template <typename N>
struct TileCall {
  static constexpr int kMostNodes = 32;  // of a block
  WideCall<N> wide;
  TileView tiles;
  const N* rows;        // [E, record], by position: edges sorted by target
  N* grad_rows;         // likewise: the gradients of h, of the direction, and of the factor in constant paths; or null
  int nodes_per_block;  // neighbouring ones
};

}  // namespace implicit_steer::IST_ISA
