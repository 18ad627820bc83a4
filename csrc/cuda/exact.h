// The exact kernels' entry points (exact.cu), which are for float alone.
#pragma once

#include "field_launch.h"
#include "library.h"

namespace implicit_steer::IST_ISA {

// Whether the plan has an exact kernel for the forward or the backward pass that fits in a block's shared memory on
// every device; R = float.
template <typename R>
bool has_exact_kernel(const DevicePlan<R>& plan, bool backward);

// `launch` becomes that of the forward pass of a plan that has an exact kernel; R = float.
template <typename R>
Failure prepare_exact_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, FieldLaunch& launch);

// Launches the backward pass up to sums over its rows; `mean` as in Call, `more`: numbers of memory behind the rows.
template <typename R>
Failure run_exact_backward(const DevicePlan<R>& plan, const ConvArgs<R>& args, bool mean, int64_t more, void* stream,
                           GradientRows<R>& rows);

}  // namespace implicit_steer::IST_ISA
