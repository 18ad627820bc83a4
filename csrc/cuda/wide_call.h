// A call of the kernels of layers with many fields: what all of them read, and where their results lie.
#pragma once

#include "../dual.h"
#include "wide_plan.h"

namespace implicit_steer::IST_ISA {

template <typename N>
struct WideCall {
  using R = Real<N>;
  ConvArgs<R> args;  // plan: null
  PlanView<R> plan;  // pointers to device memory
  Places places;
  WideView lists;
  int64_t first_node, n_nodes;  // of this launch's block of nodes, within which nodes are counted
  bool mean;                    // grad_out is that of the mean over a node's edges
  const N* x;                   // [N_src, n_gathered]
  const N* records;             // [E, record]
  N* grad_records;              // likewise, or null
  // By slot, [slot][node][..]. With tangents T has pairs (tangent, value), as their products with pairs of weights
  // make the tangent; or, where its gradient by θ is wanted, tangents alone.
  R *sums, *outputs;
  bool tangents_only;
  const R* grad_outputs;
  const N* grad_sums;

  // Where the numbers of a slot's node begin, of so many per slot and node.
  IST_HOST_DEVICE int64_t at(int32_t slot_at, int64_t node, int64_t size) const {
    return slot_at * n_nodes + node * size;
  }
  // Positions of the edges into a node of the block
  IST_HOST_DEVICE int64_t first_edge(int64_t node) const { return args.index(args.rowptr, first_node + node); }
};

}  // namespace implicit_steer::IST_ISA
