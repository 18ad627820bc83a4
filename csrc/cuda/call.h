// One call as kernels get it, and what the host knows about it.
#pragma once

#include <limits>

#include "../cpu/conv.h"
#include "../plan.h"

namespace implicit_steer {

constexpr int kThreads = 128;  // of a block, at most

// Blocks that a multiprocessor should hold, by the size of a kernel's numbers: more of them would have too few
// registers. The forward pass of specialised layers (specialised.cuh) takes fewer.
template <typename N>
constexpr int kResident = sizeof(N) == 4 ? 3 : 2;
constexpr int kSpecialisedForwardResident = 4;

// Which of an edge's arrays a kernel needs: those of neighbours' features, those of the reverse sweep, those of
// specialised layers (specialised.cuh).
struct Needs {
  bool features, backward, specialised;
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

// What the couplings read and write, in lists. A row is four inputs v of a slot's T; a term of it is one of the blocks
// that it sums over, and of specialised layers has one coefficient of all channels, or, after all others, the constant
// one.
struct CouplingLists {
  int n_rows, n_constant_rows, n_terms, n_degrees;
  const int32_t* rows;            // [n_rows + n_constant_rows, 4] place in T, inputs, first term, one past the last
  const int32_t* terms;           // [n_terms, 4] place of the four products, coefficient or -1, place in T, inputs
  const int32_t* by_coefficient;  // the terms that have one, coefficient by coefficient
  const int32_t* first;           // [c + 1] where each coefficient's begin there
  // Nonzeros of all G by their harmonic m, those without one at the end:
  const int32_t* harmonic;  // [d + 2] where each m's begin
  const int32_t* nonzero;   // [n_nz, 2] g, number among the plan's nonzeros
  // What zonal frames are made of, as far as couplings read it:
  const int32_t* monomials;  // [used_monomials - 1] all but the first, by degree
  const int32_t* degrees;    // [n_degrees + 1] where each degree's begin there
  const int32_t* solid;      // [d, 2] of each harmonic, its first term among the plan's and one past its last
};

// Sizes are in numbers of the kernel's kind: float, double or dual.
struct Shape {
  int block_size;          // memory of a block in front of its warps'
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
