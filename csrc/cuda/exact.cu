// The exact kernels for all sizes that they are compiled for, and their launches.

#include "exact.h"
#include "exact_forward.cuh"
#include "launch.h"

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

// A launch of blocks of kThreads threads that share the edges.
struct ExactLaunch {
  const char* name;
  void (*kernel)(ExactCall);
  ExactCall call;
  int64_t bytes;  // of a block's shared memory

  Failure prepare(const DevicePlan<float>& plan, const ConvArgs<float>& args) {
    call.args = args, call.args.plan = nullptr, call.plan = plan.view, call.exact = plan.exact_view;
    PreparedKernel found{};
    IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&] { return ask(found); }));
    const int64_t most = std::max<int64_t>(found.resident, 1), chunks = (args.n_edges + 31) / 32;
    Shape& shape = call.shape;
    shape.edges_per_warp = std::max<int64_t>((chunks + most - 1) / most, 1) * 32;
    shape.warps = static_cast<int>((args.n_edges + shape.edges_per_warp - 1) / shape.edges_per_warp);
    return {};
  }

  Failure ask(PreparedKernel& found) const {
    Device device;
    IST_TRY(device.read());
    if (bytes > device.block_bytes) return {name, "a block's shared memory is too small for the plan"};
    IST_TRY(
        failure(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes)));
    int blocks = 0;
    IST_TRY(failure(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes)));
    found.resident = int64_t{blocks} * (kThreads / 32) * device.multiprocessors;
    return {};
  }

  Failure run(void* stream) const {
    const dim3 grid((call.shape.warps + kThreads / 32 - 1) / (kThreads / 32));
    return launch(name, kernel, grid, dim3(kThreads), bytes, stream, call);
  }
};

}  // namespace

template <>
Failure run_exact_forward(const DevicePlan<float>& plan, const ConvArgs<float>& args, void* stream, Call<float>& call) {
  return with_exact_sizes(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    const int64_t numbers = ExactMemory<S>::in_front_of_mlp + ExactMlp::size<S>(plan.host);
    ExactLaunch edges{"exact_forward", exact_forward<S>, {}, static_cast<int64_t>(sizeof(float)) * numbers};
    IST_TRY(edges.prepare(plan, args));
    const int64_t n = int64_t{2} * edges.call.shape.warps * plan.view.out_size;
    edges.call.partial = static_cast<float*>(args.scratch(std::max<int64_t>(n, 1) * sizeof(float)));
    call = edges.call;
    return edges.run(stream);
  });
}

}  // namespace implicit_steer::IST_ISA
