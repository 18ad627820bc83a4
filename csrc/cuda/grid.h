// The grid kernels' entry points (grid.cu), which are for float alone.
#pragma once

#include "device_plan.h"
#include "library.h"

namespace implicit_steer::IST_ISA {

// Launches the forward pass of a plan that has a grid kernel, as run_exact_forward() does.
template <typename R>
Failure run_grid_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream, Call<R>& call);

// Whether such a plan has a grid kernel for the backward pass, too: one that fits in a block's shared memory on every
// device.
template <typename R>
bool has_grid_backward(const DevicePlan<R>& plan);

// Launches it, as run_exact_backward() does.
template <typename R>
Failure run_grid_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, bool mean, int64_t more, void* stream,
                          GradientRows<R>& rows);

}  // namespace implicit_steer::IST_ISA
