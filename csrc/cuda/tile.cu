// The tile kernels and their launches, for numbers of float or, with IST_TANGENTS, for dual ones. Compiled once for
// each.

#include "field_passes.h"
#include "tile.h"
#include "tile_backward.cuh"
#include "tile_layers_backward.cuh"
#include "tile_sums.cuh"

namespace implicit_steer::IST_ISA {

namespace {

#if defined(IST_TANGENTS)
using N = Dual<float>;
template <typename S>
using OfNumbers = WithTangents<S>;
#else
using N = float;
template <typename S>
using OfNumbers = S;
#endif
// Dual numbers of 16 channels take more than the 255 registers that a thread can have, but for tables of few
// coefficients.
constexpr bool kAllWide = !is_dual<N>;
constexpr int64_t kBytes = sizeof(N), kFloats = kBytes / sizeof(float);  // of a number

// run(sizes): those of the plan's hidden layers, or of its table.
template <typename Run>
auto with_layers(const DevicePlan<float>& plan, Run run) {
  const bool wide = plan.tile.width == 16, more = plan.tile.coefficients == 6, table = plan.host.n_knots > 0;
  const auto of_function = [&](auto tag) {
    using F = decltype(tag);
    if constexpr (kAllWide)
      if (wide) return more ? run(OfNumbers<Tiled<F, 6, 16>>{}) : run(OfNumbers<Tiled<F, 4, 16>>{});
    return more ? run(OfNumbers<Tiled<F, 6, 8>>{}) : run(OfNumbers<Tiled<F, 4, 8>>{});
  };
  if (!table) return plan.host.function == kElu ? of_function(Elu{}) : of_function(Silu{});
  if constexpr (kAllWide)
    if (wide && more) return run(OfNumbers<TiledTable<6, 16>>{});
  if (wide) return run(OfNumbers<TiledTable<4, 16>>{});
  return more ? run(OfNumbers<TiledTable<6, 8>>{}) : run(OfNumbers<TiledTable<4, 8>>{});
}

// Whether these are compiled.
bool has_layers(const DevicePlan<float>& plan) {
  const bool few = plan.host.n_knots && plan.tile.coefficients == 4;
  return plan.tile.coefficients > 0 && (kAllWide || plan.tile.width == 8 || few);
}

TileCall<N> tile_call(const DevicePlan<float>& plan, const WideCall<N>& call, const N* rows, N* grad_rows) {
  // As many nodes as fill the lanes with edges.
  const int64_t degree = call.args.n_edges / std::max<int64_t>(call.args.n_dst, 1);
  const int64_t nodes = std::max<int64_t>(TileCall<N>::kMostNodes / std::max<int64_t>(degree, 1), 1);
  return {call, plan.tile_view, rows, grad_rows, static_cast<int>(nodes)};
}

// A kernel whose blocks have some nodes each, and so many numbers of shared memory.
Failure run_on_nodes(const char* name, void (*kernel)(TileCall<N>), int64_t numbers, const DevicePlan<float>& plan,
                     const TileCall<N>& call, void* stream) {
  LaunchFacts found{};
  IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&]() -> Failure {
    Device device;
    IST_TRY(device.read());
    return failure(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes));
  }));
  const int64_t blocks = (call.wide.n_nodes + call.nodes_per_block - 1) / call.nodes_per_block;
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), numbers * kBytes, stream, call);
}

}  // namespace

template <>
bool has_tile_kernels<N>(const DevicePlan<float>& plan, bool backward) {
  if (!has_layers(plan)) return false;
  const TileView tiles = plan.tile.view(plan.tile.numbers.data());
  const int64_t of_nodes = backward ? TileBackward<N>::size(tiles) : TileSums<N>::size(tiles);
  if (kBytes * of_nodes > kLeastBlockBytes) return false;
  return with_layers(plan, [&](auto sizes) {
    using S = decltype(sizes);
    const int64_t of_warp = backward ? tile_reverse_size<S>(plan.host) : ExactMemory<S>::warp;
    return kBytes * (front_of_warps<S>(plan.host) + of_warp) <= kLeastBlockBytes;
  });
}

template <>
Failure run_tile_layers(const DevicePlan<float>& plan, const ConvArgs<float>& args, N* rows, void* stream) {
  return with_layers(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    FieldLaunch edges{
        "tile_layers", tile_layers<S>, {}, kFloats * front_of_warps<S>(plan.host), kFloats * ExactMemory<S>::warp, 0};
    IST_TRY(edges.prepare(plan, args, kAnyWarps));
    edges.call.view.first = plan.tile_view.first;
    edges.call.records.at = reinterpret_cast<float*>(rows);
    return edges.run(stream);
  });
}

template <>
Failure run_tile_sums(const DevicePlan<float>& plan, const WideCall<N>& call, const N* rows, void* stream) {
  return run_on_nodes("tile_sums", tile_sums<N>, TileSums<N>::size(plan.tile_view), plan,
                      tile_call(plan, call, rows, nullptr), stream);
}

template <>
Failure run_tile_backward(const DevicePlan<float>& plan, const WideCall<N>& call, const N* rows, N* grad_rows,
                          void* stream) {
  return run_on_nodes("tile_backward", tile_backward<N>, TileBackward<N>::size(plan.tile_view), plan,
                      tile_call(plan, call, rows, grad_rows), stream);
}

template <>
Failure run_tile_layers_backward(const DevicePlan<float>& plan, const ConvArgs<float>& args, const N* grad_rows,
                                 int64_t more, void* stream, GradientRows<float>& rows) {
  return with_layers(plan, [&](auto sizes) -> Failure {
    using S = decltype(sizes);
    FieldLaunch edges{"tile_layers_backward",
                      tile_layers_backward<S>,
                      {},
                      kFloats * front_of_warps<S>(plan.host),
                      kFloats * tile_reverse_size<S>(plan.host),
                      0};
    const int64_t of_warp = args.grad_weights ? kFloats * TileGradients<S>::size_of(plan.host) : 0;
    IST_TRY(edges.prepare(plan, args, most_warps_with<float>(of_warp)));
    edges.call.view.first = plan.tile_view.first;
    edges.call.plan.n_grad = plan.wide.theta, edges.call.records.grad = reinterpret_cast<const float*>(grad_rows);
    rows.n = edges.blocks(), rows.size = plan.wide.theta;
    const int64_t of_warps = of_warp * edges.call.shape.warps, of_rows = args.grad_weights ? rows.n * rows.size : 0;
    edges.call.sums = static_cast<float*>(
        args.scratch(std::max<int64_t>(of_warps + of_rows + more, 1) * static_cast<int64_t>(sizeof(float))));
    rows.at = edges.call.partial = edges.call.sums + of_warps;
    return edges.run(stream);
  });
}

}  // namespace implicit_steer::IST_ISA
