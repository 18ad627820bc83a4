// The grid kernel's entry point (grid.cu), which is for float alone.
#pragma once

#include "device_plan.h"
#include "library.h"

namespace implicit_steer::IST_ISA {

// Launches the forward pass of a plan that has a grid kernel, as run_exact_forward() does.
template <typename R>
Failure run_grid_forward(const DevicePlan<R>& plan, const ConvArgs<R>& args, void* stream, Call<R>& call);

}  // namespace implicit_steer::IST_ISA
