// What the torch binding hands to the loops of cpu/*.h, and the table of entry points of one instruction set.
#pragma once

#include "../plan.h"

namespace implicit_steer {

// out [batch, rows, columns] = A [batch, rows, inner] B [batch, inner, columns], dense, row by row; of a transposed
// factor its transposes are.
template <typename R>
struct MatrixProducts {
  const R *a, *b;
  R* out;
  int64_t batch, rows, inner, columns;
  bool a_transposed, b_transposed;
};

template <typename R>
struct ConvArgs {
  PlanView<R>* plan;
  const R* weights;                                   // packed; with tangents: pairs of a weight and its tangent
  const R *x, *delta, *attr;                          // [N_src, C_in], [E, dim], [E, A]
  const R *x_tangent, *delta_tangent, *attr_tangent;  // as these, in calls for derivatives along a direction
  const void *src, *order, *rowptr;                   // [E], [E] edges by target, [N_dst + 1]
  const void *order_by_source, *colptr;               // [E], [N_src + 1]
  bool index64;                                       // indices are int64, else int32
  int64_t n_src, n_dst, n_edges;
  int threads;                      // at most; see blocks.h
  void* (*scratch)(int64_t bytes);  // 64-byte aligned memory of the calling thread, valid until its next call
  void (*multiply)(const MatrixProducts<R>&) = nullptr;  // of GPUs: a library's, in the stream of the call
  const void* features = nullptr;  // [N_src, n_gathered] x by field type, with tangents in pairs; set by the loops
  R* out;                          // [N_dst, C_out]
  // Of GPUs: what a forward pass keeps of its sums over nodes, so that a backward pass need not form them again; or
  // null. CudaTable::node_sums_size says how many numbers.
  R* node_sums = nullptr;
  // backward
  const R* grad_out;          // [N_dst, C_out]
  R* grad_edge;               // [E, n_gathered] memory for the features' gradient edge by edge, or null; where
                              // blocks * N_src <= E, it is summed node by node for each block instead
  bool grad_by_node = false;  // whether it is, as conv.cpp sets it
  R* grad_x;                  // [N_src, C_in]
  R *grad_delta, *grad_attr;  // as delta and attr, or null
  R* grad_weights;            // [backward_blocks, n_grad]; the sum over blocks lands in the first; or null
  // statistics
  int layer;
  double* sums;   // [statistics_blocks, 2, channels * d] sums and sums of squares of h - shift; as grad_weights
  double* shift;  // [channels * d]

  IST_HOST_DEVICE int64_t index(const void* p, int64_t n) const {
    return index64 ? static_cast<const int64_t*>(p)[n] : static_cast<const int32_t*>(p)[n];
  }
};

template <typename R>
struct ConvTable {
  void (*forward)(const ConvArgs<R>&);
  void (*backward)(const ConvArgs<R>&);
  void (*forward_tangent)(const ConvArgs<R>&);   // of forward and backward: the derivatives, along the tangents, of
  void (*backward_tangent)(const ConvArgs<R>&);  // what these give, at constant grad_out
  void (*statistics)(const ConvArgs<R>&);
  void (*table_sums)(const ConvArgs<R>&);       // out: see table_sums.h
  void (*hidden_forward)(const ConvArgs<R>&);   // out: h [E, H]
  void (*hidden_backward)(const ConvArgs<R>&);  // grad_out: of h
  void (*hidden_forward_tangent)(const ConvArgs<R>&);
  void (*hidden_backward_tangent)(const ConvArgs<R>&);
  void (*function)(int which, const R* x, R* y, int64_t n);  // 0 .. 4: φ of Function; 5: exp; 6: erf. For tests.
  int64_t (*peak)(int threads, int64_t rounds, R* sums);     // multiply-adds made; sums: [threads]. For the benchmark.
};

// Entry points per instruction set; only those that CMake compiles exist.
#define IST_DECLARE(ISA)                      \
  namespace ISA {                             \
  extern const ConvTable<float> kConvFloat;   \
  extern const ConvTable<double> kConvDouble; \
  }
IST_DECLARE(baseline)
IST_DECLARE(avx2)
IST_DECLARE(avx512)
#undef IST_DECLARE

}  // namespace implicit_steer
