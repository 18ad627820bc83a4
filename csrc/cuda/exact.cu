// The exact kernels for all sizes that they are compiled for, and their launches.

#include "exact.h"
#include "exact_backward.cuh"
#include "exact_forward.cuh"
#include "exact_launch.h"

namespace implicit_steer::IST_ISA {

namespace {

// run(sizes): those of the plan.
template <typename F, typename Run>
Failure with_slots(const DevicePlan<float>& plan, Run run) {
  constexpr int fields = ExactPlan::kMostFields;
  return plan.exact.cross ? run(Exact<F, 8, fields, true>{}) : run(Exact<F, 8, fields, false>{});
}
template <typename Run>
Failure with_exact_sizes(const DevicePlan<float>& plan, Run run) {
  return plan.sizes == Sizes::kElu4x8 ? with_slots<Elu>(plan, run) : with_slots<Silu>(plan, run);
}

}  // namespace

template <>
Failure run_exact_forward(const DevicePlan<float>& plan, const ConvArgs<float>& args, void* stream, Call<float>& call) {
  return with_exact_sizes(plan, [&](auto sizes) {
    using S = decltype(sizes);
    return run_forward_of<S>("exact_forward", exact_forward<S>, plan, args, stream, call);
  });
}

template <>
Failure run_exact_backward(const DevicePlan<float>& plan, const ConvArgs<float>& args, bool mean, int64_t more,
                           void* stream, GradientRows<float>& rows) {
  return with_exact_sizes(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    const int64_t front = ExactMemory<S>::in_front_of_mlp(0, 0) + ExactMlp::size<S>(plan.host);
    const ExactLaunch edges{"exact_backward", exact_backward<S>, {}, front, exact_backward_size<S>(plan.host), 0};
    return run_backward_of<S>(edges, 0, plan, args, mean, more, stream, rows);
  });
}

}  // namespace implicit_steer::IST_ISA
