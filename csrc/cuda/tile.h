// The tile kernels' entry points (tile.cu), which are for float alone: the passes of wide_passes.h for plans that have
// them.
#pragma once

#include "device_plan.h"
#include "wide_call.h"

namespace implicit_steer::IST_ISA {

// Whether the plan has tile kernels for the forward or the backward pass that fit in a block's shared memory on every
// device; R = float.
template <typename R>
bool has_tile_kernels(const DevicePlan<R>& plan, bool backward);

// Writes the records of all edges to `rows`, [E, record] by position; R = float.
template <typename R>
Failure run_tile_layers(const DevicePlan<R>& plan, const ConvArgs<R>& args, R* rows, void* stream);

// T of the call's nodes from the edges' records; R = float.
template <typename R>
Failure run_tile_sums(const DevicePlan<R>& plan, const WideCall<R>& call, const R* rows, void* stream);

// From dT of the call's nodes the gradients of their edges' features, and of records unless `grad_rows` is null; R =
// float.
template <typename R>
Failure run_tile_backward(const DevicePlan<R>& plan, const WideCall<R>& call, const R* rows, R* grad_rows,
                          void* stream);

// The backward pass from the records' gradients up to sums over its rows; `more` as in run_exact_backward; R = float.
template <typename R>
Failure run_tile_layers_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, const R* grad_rows, int64_t more,
                                 void* stream, GradientRows<R>& rows);

}  // namespace implicit_steer::IST_ISA
