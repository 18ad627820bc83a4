// The launch of a kernel whose warps walk ranges of edges or points.
#pragma once

#include <algorithm>

#include "device_plan.h"
#include "launch.h"

namespace implicit_steer::IST_ISA {

// A kernel on edges or points, and the shape of its launch.
template <typename N>
struct EdgeKernel {
  using R = Real<N>;
  const char* name;
  void (*kernel)(Call<R>);
  Call<R> call{};
  int warps_per_block;

  // `rest`: numbers of a warp behind its edges; warps beyond `most_warps` get no edges.
  Failure prepare(const DevicePlan<R>& plan, const ConvArgs<R>& args, Needs needs, int64_t rest, int64_t most_warps) {
    call.args = args, call.args.plan = nullptr, call.plan = plan.view, call.extent = plan.extent,
    call.places = plan.places, call.terms = plan.terms;
    LaunchFacts found{};
    IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&] { return ask(plan, needs, rest, found); }));
    Shape& shape = call.shape;
    shape = found.shape, warps_per_block = found.warps_per_block;
    const int64_t tile = 32 / shape.lanes, most = std::max<int64_t>(std::min(found.resident, most_warps), 1);
    const int64_t tiles = (args.n_edges + tile - 1) / tile;
    shape.edges_per_warp = std::max<int64_t>((tiles + most - 1) / most, 1) * tile;
    shape.warps = static_cast<int>((args.n_edges + shape.edges_per_warp - 1) / shape.edges_per_warp);
    return {};
  }

  Failure ask(const DevicePlan<R>& plan, Needs needs, int64_t rest, LaunchFacts& found) {
    Device device;
    IST_TRY(device.read());
    Shape& shape = found.shape;
    shape = best_shape<N>(plan.view, plan.extent, needs, rest, device);
    const int64_t warp_bytes = static_cast<int64_t>(sizeof(N)) * shape.warp_size;
    const int64_t warps = std::min<int64_t>(kThreads / 32, (device.block_bytes - kBlockBytes) / warp_bytes);
    if (warps <= 0) return {name, "a block's shared memory is too small for the plan"};
    found.warps_per_block = static_cast<int>(warps);
    // Of the kernel, not of this launch: always the same, whichever call comes between the two.
    IST_TRY(
        failure(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_bytes)));
    int blocks = 0;
    IST_TRY(failure(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * found.warps_per_block,
                                                                        block_bytes(shape, warps))));
    found.resident = int64_t{blocks} * warps * device.multiprocessors;
    return {};
  }

  static int64_t block_bytes(const Shape& shape, int64_t warps) {
    return kBlockBytes + static_cast<int64_t>(sizeof(N)) * warps * shape.warp_size;
  }

  Failure run(void* stream) const {
    const dim3 grid((call.shape.warps + warps_per_block - 1) / warps_per_block);
    const int64_t bytes = block_bytes(call.shape, warps_per_block);
    return launch(name, kernel, grid, dim3(32 * warps_per_block), bytes, stream, call);
  }
};

}  // namespace implicit_steer::IST_ISA
