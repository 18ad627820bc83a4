// The grid kernels for all functions that they are compiled for, and their launch.

#include "exact_launch.h"
#include "grid.h"
#include "grid_forward.cuh"

namespace implicit_steer::IST_ISA {

template <>
Failure run_grid_forward(const DevicePlan<float>& plan, const ConvArgs<float>& args, void* stream, Call<float>& call) {
  const auto run = [&](auto sizes) {
    using S = decltype(sizes);
    return run_forward_of<S>("grid_forward", grid_forward<S>, plan, args, stream, call);
  };
  constexpr int fields = GridPlan::kFields;
  return plan.host.function == kElu ? run(Grid<Elu, 8, fields>{}) : run(Grid<Silu, 8, fields>{});
}

}  // namespace implicit_steer::IST_ISA
