// The grid kernels for all functions that they are compiled for, and their launches.

#include "field_passes.h"
#include "grid.h"
#include "grid_backward.cuh"
#include "grid_forward.cuh"

namespace implicit_steer::IST_ISA {

namespace {

template <typename Run>
auto with_grid_function(const DevicePlan<float>& plan, Run run) {
  constexpr int fields = GridPlan::kFields;
  return plan.host.function == kElu ? run(Grid<Elu, 8, fields>{}) : run(Grid<Silu, 8, fields>{});
}

// Numbers of a block's shared memory in front of its warps'.
template <typename S>
int64_t front_of_backward(const PlanView<float>& p) {
  return front_of_warps<S>(p) + GridBackward<S>::size_behind_mlp();
}

}  // namespace

template <>
bool has_grid_backward(const DevicePlan<float>& plan) {
  if (plan.grid.fields == 0 || !plan.grid.reads_all) return false;
  return with_grid_function(plan, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t numbers = front_of_backward<S>(plan.host) + exact_backward_size<S>(plan.host);
    return static_cast<int64_t>(sizeof(float)) * numbers <= kLeastBlockBytes;
  });
}

template <>
Failure prepare_grid_forward(const DevicePlan<float>& plan, const ConvArgs<float>& args, FieldLaunch& launch) {
  return with_grid_function(plan, [&](auto sizes) {
    using S = decltype(sizes);
    return prepare_forward_of<S>("grid_forward", grid_forward<S>, plan, args, launch);
  });
}

template <>
Failure run_grid_backward(const DevicePlan<float>& plan, const ConvArgs<float>& args, bool mean, int64_t more,
                          void* stream, GradientRows<float>& rows) {
  return with_grid_function(plan, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t front = front_of_backward<S>(plan.host);
    const FieldLaunch edges{"grid_backward",          grid_backward<S>, {}, front, exact_backward_size<S>(plan.host), 0,
                            kGridBackwardThreads / 32};
    return run_backward_of<S>(edges, KeptLayers<S>::size(plan.host), plan, args, mean, more, stream, rows);
  });
}

}  // namespace implicit_steer::IST_ISA
