// The launches of forward and backward passes by the exact and the grid kernels.
#pragma once

#include "exact_forward.cuh"
#include "exact_gradients.cuh"
#include "field_launch.h"

namespace implicit_steer::IST_ISA {

constexpr int64_t kLeastBlockBytes = 99 << 10;  // of shared memory that a block can have, on sm_86, 89 and 120

// Numbers of a block's shared memory in front of its warps'.
template <typename S>
int64_t front_of_warps(const PlanView<float>& p) {
  return ExactMemory<S>::in_front_of_mlp(0, 0) + S::Mlp::template size<S>(p);
}

// The kernel of a forward pass, prepared.
template <typename S>
Failure prepare_forward_of(const char* name, void (*kernel)(FieldCall), const DevicePlan<float>& plan,
                           const ConvArgs<float>& args, FieldLaunch& edges) {
  const int64_t front = front_of_warps<S>(plan.host);
  edges = {name, kernel, {}, front, kExactForwardSize<S>, 0, kExactForwardThreads<S> / 32, kNodeSum<S>};
  return edges.prepare(plan, args, kAnyWarps);
}

// The kernel of a backward pass; `edges`: the launch before prepare(), `kept`: numbers that a warp keeps in global
// memory, in front of the warps' sums. `rows` and `more` as in run_exact_backward.
template <typename S>
Failure run_backward_of(FieldLaunch edges, int64_t kept, const DevicePlan<float>& plan, const ConvArgs<float>& args,
                        bool mean, int64_t more, void* stream, GradientRows<float>& rows) {
  using Gradients = ExactGradients<S>;
  const int64_t of_warp = args.grad_weights ? Gradients::size_of(plan.host) + Gradients::aside : 0;
  IST_TRY(edges.prepare(plan, args, most_warps_with<float>(of_warp)));
  edges.call.mean = mean;
  rows.n = edges.blocks(), rows.size = plan.view.n_grad;
  const int64_t warps = edges.call.shape.warps, of_warps = of_warp * warps;
  const int64_t of_rows = args.grad_weights ? rows.n * plan.view.n_grad : 0;
  const int64_t n = kept * warps + of_warps + of_rows + more;
  float* const memory =
      static_cast<float*>(args.scratch(std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(float))));
  edges.call.sums = memory + kept * warps;
  rows.at = edges.call.partial = edges.call.sums + of_warps;
  return edges.run(stream);
}

}  // namespace implicit_steer::IST_ISA
