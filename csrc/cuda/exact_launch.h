// Launches of the kernels of exact_warp.cuh.
#pragma once

#include "device_plan.h"
#include "exact_forward.cuh"
#include "exact_gradients.cuh"
#include "launch.h"

namespace implicit_steer::IST_ISA {

// A launch of blocks whose warps share the edges.
struct ExactLaunch {
  const char* name;
  void (*kernel)(ExactCall);
  ExactCall call;
  int64_t front, of_warp;  // numbers of a block's shared memory: in front of its warps', and of a warp
  int warps_per_block;
  int most_warps = kThreads / 32;  // of a block

  Failure prepare(const DevicePlan<float>& plan, const ConvArgs<float>& args) {
    call.args = args, call.args.plan = nullptr, call.plan = plan.view, call.exact = plan.exact_view;
    PreparedKernel found{};
    IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&] { return ask(found); }));
    const int64_t most = std::max<int64_t>(found.resident, 1), chunks = (args.n_edges + 31) / 32;
    Shape& shape = call.shape;
    shape.edges_per_warp = std::max<int64_t>((chunks + most - 1) / most, 1) * 32;
    shape.warps = static_cast<int>((args.n_edges + shape.edges_per_warp - 1) / shape.edges_per_warp);
    warps_per_block = found.warps_per_block;
    return {};
  }

  Failure ask(PreparedKernel& found) const {
    Device device;
    IST_TRY(device.read());
    cudaFuncAttributes attributes{};
    IST_TRY(failure(name, cudaFuncGetAttributes(&attributes, kernel)));
    int& warps = found.warps_per_block = std::min(most_warps, attributes.maxThreadsPerBlock / 32);
    while (bytes(warps) > device.block_bytes)
      if (--warps == 0) return {name, "a block's shared memory is too small for the plan"};
    IST_TRY(
        failure(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes)));
    int blocks = 0;
    IST_TRY(failure(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * warps, bytes(warps))));
    found.resident = int64_t{blocks} * warps * device.multiprocessors;
    return {};
  }

  int64_t bytes(int warps) const { return static_cast<int64_t>(sizeof(float)) * (front + warps * of_warp); }
  int64_t blocks() const { return (call.shape.warps + warps_per_block - 1) / warps_per_block; }
  Failure run(void* stream) const {
    return launch(name, kernel, dim3(static_cast<unsigned>(blocks())), dim3(32 * warps_per_block),
                  bytes(warps_per_block), stream, call);
  }
};

constexpr int64_t kLeastBlockBytes = 99 << 10;  // of shared memory that a block can have, on sm_86, 89 and 120

// Numbers of a block's shared memory in front of its warps'.
template <typename S>
int64_t front_of_warps(const PlanView<float>& p) {
  return ExactMemory<S>::in_front_of_mlp(0, 0) + S::Mlp::template size<S>(p);
}

// The kernel of a forward pass; `call` becomes what it gets.
template <typename S>
Failure run_forward_of(const char* name, void (*kernel)(ExactCall), const DevicePlan<float>& plan,
                       const ConvArgs<float>& args, void* stream, Call<float>& call) {
  ExactLaunch edges{
      name, kernel, {}, front_of_warps<S>(plan.host), kExactForwardSize<S>, 0, kExactForwardThreads<S> / 32};
  IST_TRY(edges.prepare(plan, args));
  const int64_t n = int64_t{2} * edges.call.shape.warps * plan.view.out_size;
  edges.call.partial = static_cast<float*>(args.scratch(std::max<int64_t>(n, 1) * sizeof(float)));
  call = edges.call;
  return edges.run(stream);
}

// That of a backward pass; `edges`: the launch before prepare(), `kept`: numbers that a warp keeps in global memory, in
// front of the warps' sums. `rows` and `more` as in run_exact_backward.
template <typename S>
Failure run_backward_of(ExactLaunch edges, int64_t kept, const DevicePlan<float>& plan, const ConvArgs<float>& args,
                        bool mean, int64_t more, void* stream, GradientRows<float>& rows) {
  using Gradients = ExactGradients<S>;
  IST_TRY(edges.prepare(plan, args));
  edges.call.mean = mean;
  rows.n = edges.blocks();
  const int64_t warps = edges.call.shape.warps, of_warp = Gradients::size_of(plan.host) + Gradients::aside;
  const int64_t of_warps = args.grad_weights ? of_warp * warps : 0;
  const int64_t of_rows = args.grad_weights ? rows.n * plan.view.n_grad : 0;
  const int64_t n = kept * warps + of_warps + of_rows + more;
  float* const memory =
      static_cast<float*>(args.scratch(std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(float))));
  edges.call.sums = memory + kept * warps;
  rows.at = edges.call.partial = edges.call.sums + of_warps;
  return edges.run(stream);
}

}  // namespace implicit_steer::IST_ISA
