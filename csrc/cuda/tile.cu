// The tile kernels and their launches.

#include "field_passes.h"
#include "tile.h"
#include "tile_backward.cuh"
#include "tile_layers_backward.cuh"
#include "tile_sums.cuh"

namespace implicit_steer::IST_ISA {

namespace {

// run(sizes): those of the plan's hidden layers, or of its table.
template <typename Run>
auto with_layers(const DevicePlan<float>& plan, Run run) {
  const bool wide = plan.tile.width == 16, more = plan.tile.coefficients == 6;
  if (plan.host.n_knots && wide) return more ? run(TiledTable<6, 16>{}) : run(TiledTable<4, 16>{});
  if (plan.host.n_knots) return more ? run(TiledTable<6, 8>{}) : run(TiledTable<4, 8>{});
  const auto of_function = [&](auto tag) {
    using F = decltype(tag);
    return wide ? run(Tiled<F, 4, 16>{}) : more ? run(Tiled<F, 6, 8>{}) : run(Tiled<F, 4, 8>{});
  };
  return plan.host.function == kElu ? of_function(Elu{}) : of_function(Silu{});
}

// Numbers of a block's shared memory in front of its warps'.
template <typename S>
int64_t front_of_layers(const DevicePlan<float>& plan, S) {
  return ExactMemory<S>::in_front_of_mlp(0, 0) + S::Mlp::template size<S>(plan.host);
}

TileCall tile_call(const DevicePlan<float>& plan, const WideCall<float>& call, const float* rows, float* grad_rows) {
  // As many nodes as fill the lanes with edges.
  const int64_t degree = call.args.n_edges / std::max<int64_t>(call.args.n_dst, 1);
  const int64_t nodes = std::max<int64_t>(TileCall::kMostNodes / std::max<int64_t>(degree, 1), 1);
  return {call, plan.tile_view, rows, grad_rows, static_cast<int>(nodes)};
}

// A kernel whose blocks have some nodes each, and so many numbers of shared memory.
Failure run_on_nodes(const char* name, void (*kernel)(TileCall), int64_t numbers, const DevicePlan<float>& plan,
                     const TileCall& call, void* stream) {
  LaunchFacts found{};
  IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&]() -> Failure {
    Device device;
    IST_TRY(device.read());
    return failure(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes));
  }));
  const int64_t blocks = (call.wide.n_nodes + call.nodes_per_block - 1) / call.nodes_per_block;
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads),
                numbers * static_cast<int64_t>(sizeof(float)), stream, call);
}

}  // namespace

template <>
bool has_tile_kernels(const DevicePlan<float>& plan, bool backward) {
  if (plan.tile.coefficients == 0) return false;
  return with_layers(plan, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t of_warp = backward ? tile_reverse_size<S>(plan.host) : ExactMemory<S>::warp;
    return static_cast<int64_t>(sizeof(float)) * (front_of_layers(plan, sizes) + of_warp) <= kLeastBlockBytes;
  });
}

template <>
Failure run_tile_layers(const DevicePlan<float>& plan, const ConvArgs<float>& args, float* rows, void* stream) {
  return with_layers(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    FieldLaunch edges{"tile_layers", tile_layers<S>, {}, front_of_layers(plan, sizes), ExactMemory<S>::warp, 0};
    IST_TRY(edges.prepare(plan, args, kAnyWarps));
    edges.call.view.first = plan.tile_view.first;
    edges.call.records.at = rows;
    return edges.run(stream);
  });
}

template <>
Failure run_tile_sums(const DevicePlan<float>& plan, const WideCall<float>& call, const float* rows, void* stream) {
  return run_on_nodes("tile_sums", tile_sums, TileSums::size(plan.tile_view), plan,
                      tile_call(plan, call, rows, nullptr), stream);
}

template <>
Failure run_tile_backward(const DevicePlan<float>& plan, const WideCall<float>& call, const float* rows,
                          float* grad_rows, void* stream) {
  return run_on_nodes("tile_backward", tile_backward, TileBackward::size(plan.tile_view), plan,
                      tile_call(plan, call, rows, grad_rows), stream);
}

template <>
Failure run_tile_layers_backward(const DevicePlan<float>& plan, const ConvArgs<float>& args, const float* grad_rows,
                                 int64_t more, void* stream, GradientRows<float>& rows) {
  return with_layers(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    FieldLaunch edges{"tile_layers_backward",       tile_layers_backward<S>,         {},
                      front_of_layers(plan, sizes), tile_reverse_size<S>(plan.host), 0};
    const int64_t of_warp = args.grad_weights ? TileGradients<S>::size_of(plan.host) : 0;
    IST_TRY(edges.prepare(plan, args, most_warps_with<float>(of_warp)));
    edges.call.view.first = plan.tile_view.first;
    edges.call.plan.n_grad = plan.wide.theta, edges.call.records.grad = grad_rows;
    rows.n = edges.blocks(), rows.size = plan.wide.theta;
    const int64_t of_warps = of_warp * edges.call.shape.warps, of_rows = args.grad_weights ? rows.n * rows.size : 0;
    edges.call.sums = static_cast<float*>(
        args.scratch(std::max<int64_t>(of_warps + of_rows + more, 1) * static_cast<int64_t>(sizeof(float))));
    rows.at = edges.call.partial = edges.call.sums + of_warps;
    return edges.run(stream);
  });
}

}  // namespace implicit_steer::IST_ISA
