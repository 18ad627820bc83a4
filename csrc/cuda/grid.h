// The grid kernels' entry points (grid.cu), which are for float alone.
#pragma once

#include "field_launch.h"
#include "library.h"

namespace implicit_steer::IST_ISA {

// `launch` becomes that of the forward pass of a plan that has a grid kernel.
template <typename R>
Failure prepare_grid_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, FieldLaunch& launch);

// Whether such a plan has a grid kernel for the backward pass, too: one that fits in a block's shared memory on every
// device.
template <typename R>
bool has_grid_backward(const DevicePlan<R>& plan);

// Launches it, as run_exact_backward() does.
template <typename R>
Failure run_grid_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, bool mean, int64_t more, void* stream,
                          GradientRows<R>& rows);

}  // namespace implicit_steer::IST_ISA
