// The tile kernels' entry points (tile.cu), for numbers N, float or Dual<float>: the passes of wide_passes.h for plans
// that have them.
#pragma once

#include "device_plan.h"
#include "wide_call.h"

namespace implicit_steer::IST_ISA {

// Whether the plan has tile kernels for the forward or the backward pass that fit in a block's shared memory on every
// device.
template <typename N>
bool has_tile_kernels(const DevicePlan<Real<N>>& plan, bool backward);

// Writes the records of all edges to `rows`, [E, record] by position.
template <typename N>
Failure run_tile_layers(const DevicePlan<Real<N>>& plan, const ConvArgs<Real<N>>& args, N* rows, void* stream);

// T of the call's nodes from the edges' records.
template <typename N>
Failure run_tile_sums(const DevicePlan<Real<N>>& plan, const WideCall<N>& call, const N* rows, void* stream);

// From dT of the call's nodes the gradients of their edges' features, and of records unless `grad_rows` is null.
template <typename N>
Failure run_tile_backward(const DevicePlan<Real<N>>& plan, const WideCall<N>& call, const N* rows, N* grad_rows,
                          void* stream);

// The backward pass from the records' gradients up to sums over its rows; `more` as in run_exact_backward.
template <typename N>
Failure run_tile_layers_backward(const DevicePlan<Real<N>>& plan, const ConvArgs<Real<N>>& args, const N* grad_rows,
                                 int64_t more, void* stream, GradientRows<Real<N>>& rows);

}  // namespace implicit_steer::IST_ISA
