// One call as kernels get it, and what the host knows about it.
#pragma once

#include <limits>

#include "../cpu/conv.h"
#include "../plan.h"

namespace implicit_steer {

constexpr int kThreads = 128;  // of a block, at most

// Blocks that a multiprocessor should hold, by the size of a kernel's numbers: more of them would have too few
// registers.
template <typename N>
constexpr int kResident = sizeof(N) == 4 ? 3 : 2;

// Which of an edge's arrays a kernel needs: those of neighbours' features, those of the reverse sweep.
struct Needs {
  bool features, backward;
};

// Numbers of hidden coefficients of all layers and of the widest one, which of a table are those that its splines give;
// of one node's T; of a row of the table.
struct Extent {
  int64_t all_layers, widest, sums, table_row;
};

// Where the inputs lie among those gathered by field type: input i at the places at[first[i] .. first[i + 1] - 1].
struct Places {
  const int32_t *first, *at;
};

// Numbers that can be loaded four at a time start at whole multiples of it.
IST_HOST_DEVICE constexpr int whole_quads(int n) { return (n + 3) / 4 * 4; }

// Nonzeros of all G by their harmonic m, those without one at the end.
struct CouplingLists {
  const int32_t* harmonic;  // [d + 2] where each m's begin
  const int32_t* nonzero;   // [n_nz, 2] g, number among the plan's nonzeros
};

// Sizes are in numbers of the kernel's kind: float, double or dual.
struct Shape {
  int lanes;               // that share an edge, a power of two
  int edge_size;           // one edge's slice of the warp's memory, an odd number of quads
  int warp_size;           // one warp's memory
  int warps;               // with edges
  int64_t edges_per_warp;  // whole tiles of 32 / lanes
};

// What the kernel MLP gives for every edge of a layer with many fields (wide_plan.h): h [n_rows, stride], then G [n_g],
// which begins at `g`, in `size` numbers.
template <typename R>
struct EdgeRecords {
  R* at;          // [E, size], or null: no such layer's
  const R* grad;  // their gradient, likewise
  int stride, g, size;
};

template <typename R>
struct Call {
  ConvArgs<R> args;  // plan: null
  PlanView<R> plan;  // pointers to device memory
  Extent extent;
  Places places;
  CouplingLists terms;
  Shape shape;
  EdgeRecords<R> records;
  bool mean;   // backward: grad_out is that of the mean over a node's edges
  R* partial;  // results warp by warp: [warps, 2, C_out], [warps, n_grad] or [warps, 2, channels * d]
};

// Whether kernels that count nodes and edges by 32-bit integers can count the call's.
template <typename R>
bool can_count(const ConvArgs<R>& args) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  return args.n_src <= most && args.n_dst <= most && args.n_edges <= most;
}

// What the kernel of a backward pass leaves to be added up: gradients of the first weights, [n, size].
template <typename R>
struct GradientRows {
  R* at;
  int64_t n, size;
};

}  // namespace implicit_steer
