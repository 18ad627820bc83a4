// One call as kernels get it, and what the host knows about it.
#pragma once

#include "../cpu/conv.h"
#include "../plan.h"

namespace implicit_steer {

constexpr int kThreads = 128;  // of a block, at most

// Blocks that a multiprocessor should hold, by the size of a kernel's numbers: more of them would have too few
// registers.
template <typename N>
constexpr int kResident = sizeof(N) == 4 ? 3 : 2;

// Which of an edge's arrays a kernel needs: those of neighbours' features, those of the reverse sweep, those of hot
// layers (hot.cuh).
struct Needs {
  bool features, backward, hot;
};

// Numbers of hidden coefficients of all layers and of the widest one; of one node's T.
struct Extent {
  int64_t all_layers, widest, sums;
};

// Where the inputs lie among those gathered by field type: input i at the places at[first[i] .. first[i + 1] - 1].
struct Places {
  const int32_t *first, *at;
};

// Numbers that can be loaded four at a time start at whole multiples of it.
IST_HOST_DEVICE constexpr int whole_quads(int n) { return (n + 3) / 4 * 4; }

// Sizes are in numbers of the kernel's kind: float, double or dual.
struct Shape {
  int block_size;          // memory of a block in front of its warps'
  int lanes;               // that share an edge, a power of two
  int edge_size;           // one edge's slice of the warp's memory, an odd number of quads
  int warp_size;           // one warp's memory
  int warps;               // with edges
  int64_t edges_per_warp;  // whole tiles of 32 / lanes
};

template <typename R>
struct Call {
  ConvArgs<R> args;  // plan: null
  PlanView<R> plan;  // pointers to device memory
  Extent extent;
  Places places;
  Shape shape;
  R* partial;  // results warp by warp: [warps, 2, C_out], [warps, n_grad] or [warps, 2, channels * d]
};

}  // namespace implicit_steer
