// The kernel library libimplicit_steer_cuda.so as its caller sees it: one C function that gives a table of functions on
// plain pointers, sizes and a stream. No torch, and nothing of CUDA. None of the functions but `wait` and plan_create,
// which a plan needs once, waits for the device.
#pragma once

#include <cstdint>

#include "../cpu/conv.h"
#include "../packing.h"

namespace implicit_steer {

// What could not be launched, and why; reason null: nothing failed.
struct Failure {
  const char *what, *reason;
};

// A plan in the memory of one device; belongs to whoever made it.
template <typename R>
struct DevicePlan;

// What follows a node's sum over its edges: the mean over them, if `mean`, then + expansion [C_out, n] · bias [n].
template <typename R>
struct MeanAndBias {
  const R *expansion, *bias;
  int64_t n;
  bool mean;

  // sum + (expansion · bias)[k]
  IST_HOST_DEVICE R with_bias(R sum, int64_t k) const {
    for (int64_t m = 0; m < n; ++m) sum += expansion[k * n + m] * bias[m];
    return sum;
  }
};

enum class Pass : int { kForward, kBackward, kSecond };  // the last: derivatives of a backward pass along a direction

// The kind of kernels that serve a pass: exact, grid, tiled, wide or generic; of the last three, what keeps the plan
// from the first two.
struct KernelKind {
  const char *name, *why_not;
};

template <typename R>
struct CudaTable {
  // Bytes of device memory that the plan needs; -1 when the arrays are not what ops/native/arrays.py writes.
  int64_t (*plan_bytes)(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals);
  // *plan becomes the plan in that memory, aligned to 256 bytes. Its numbers can be read on the host.
  Failure (*plan_create)(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals, void* memory,
                         void* stream, DevicePlan<R>** plan);
  void (*plan_destroy)(DevicePlan<R>*);
  const PlanView<R>* (*plan_view)(const DevicePlan<R>*);
  // The most shared memory, in bytes, that a block of one of the plan's kernels cannot do without, those of second
  // derivatives included; -1 as above.
  int64_t (*shared_bytes)(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals);
  // As ConvTable's, with device pointers. ConvArgs.plan is not read; `scratch` gives device memory; grad_edge is
  // [E, C_in].
  Failure (*forward)(const DevicePlan<R>&, const ConvArgs<R>&, const MeanAndBias<R>&, void* stream);
  Failure (*backward)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  // The forward pass of a whole layer: `pack`, whose result is args.weights, and `forward`. Two launches where an exact
  // or a grid kernel serves the plan.
  Failure (*layer_forward)(const DevicePlan<R>&, const ConvArgs<R>&, const MeanAndBias<R>&,
                           const SparseMatrix<R>& matrix, const Pieces<const R>& parameters, const NormStatistics<R>&,
                           R* packed, R* statistics, void* stream);
  // The backward pass of a whole layer, where args.grad_out is the gradient of what `forward` gives: as `backward`, and
  // the gradients of the parameters, as pack_backward, and of the bias [n]. args.grad_weights may be null: of these
  // then only that of the bias.
  Failure (*layer_backward)(const DevicePlan<R>&, const ConvArgs<R>&, const MeanAndBias<R>&,
                            const SparseMatrix<R>& transposed, const R* statistics, const Pieces<R>& grad_parameters,
                            R* grad_bias, void* stream);
  // Numbers of ConvArgs.node_sums for the edges and nodes of args; 0 where the plan's kernels take none of them.
  int64_t (*node_sums_size)(const DevicePlan<R>&, const ConvArgs<R>&);
  Failure (*forward_tangent)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  Failure (*backward_tangent)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  Failure (*hidden_forward)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  Failure (*hidden_backward)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  Failure (*hidden_forward_tangent)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  Failure (*hidden_backward_tangent)(const DevicePlan<R>&, const ConvArgs<R>&, void* stream);
  // Statistics of all batch norms over args.n_edges edges; the packed weights get the norms' scales and shifts.
  Failure (*statistics)(const DevicePlan<R>&, const ConvArgs<R>&, const Pieces<const R>& parameters, R* packed,
                        R* statistics, void* stream);
  // Of the input of batch norm args.layer over args.n_edges > 0 edges: mean and sum of squared deviations of every
  // coordinate, [2, W * d]. args.weights are at the statistics of the norms before it.
  Failure (*moments)(const DevicePlan<R>&, const ConvArgs<R>&, R* moments, void* stream);
  // packed = matrix · parameters, and the norms' scales and shifts; and their statistics, unless that is null
  Failure (*pack)(const DevicePlan<R>&, const SparseMatrix<R>& matrix, const Pieces<const R>& parameters,
                  const NormStatistics<R>&, R* packed, R* statistics, void* stream);
  // The gradient of the parameters; `transposed`: of the first n_grad rows of the matrix.
  Failure (*pack_backward)(const DevicePlan<R>&, const SparseMatrix<R>& transposed, const R* statistics,
                           const R* grad_packed, const Pieces<R>& grad_parameters, void* stream);
  // [n_weights, 2] weights and tangents
  Failure (*pair_weights)(const DevicePlan<R>&, const R* weights, const R* tangent, R* pairs, void* stream);
  // Name null where plan_bytes is -1. Needs no device.
  KernelKind (*kernel_kind)(const int32_t* ints, int64_t n_ints, const R* reals, int64_t n_reals, Pass pass);
};

struct CudaLibrary {
  const CudaTable<float>* f32;
  const CudaTable<double>* f64;
  // Stable sort of n keys in 0 .. n_keys-1 of 4 or, if index64, 8 bytes; memory: 3 n keys and sort_bytes(n).
  int64_t (*sort_bytes)(int64_t n);
  Failure (*sort)(const void* key, int64_t n, int64_t n_keys, bool index64, void* order, void* offsets, void* memory,
                  void* stream);
  Failure (*copy)(void* to, const void* from, int64_t bytes, void* stream);  // to the device, from anywhere
  Failure (*wait)(void* stream);
  Failure (*probe)();  // whether the current device can run the kernels: its driver, and machine code for it
};

}  // namespace implicit_steer

extern "C" __attribute__((visibility("default"))) const implicit_steer::CudaLibrary* implicit_steer_cuda_library();
