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
    using Gradients = ExactGradients<S>;
    const int64_t front = ExactMemory<S>::in_front_of_mlp(0, 0) + ExactMlp::size<S>(plan.host);
    ExactLaunch edges{"exact_backward", exact_backward<S>, {}, front, exact_backward_size<S>(plan.host), 0};
    IST_TRY(edges.prepare(plan, args));
    edges.call.mean = mean;
    rows.n = edges.blocks();
    const int64_t of_warp = Gradients::size_of(plan.host) + Gradients::aside;
    const int64_t of_warps = args.grad_weights ? of_warp * edges.call.shape.warps : 0;
    const int64_t of_rows = args.grad_weights ? rows.n * plan.view.n_grad : 0;
    edges.call.sums = static_cast<float*>(
        args.scratch(std::max<int64_t>(of_warps + of_rows + more, 1) * static_cast<int64_t>(sizeof(float))));
    rows.at = edges.call.partial = edges.call.sums + of_warps;
    return edges.run(stream);
  });
}

}  // namespace implicit_steer::IST_ISA
