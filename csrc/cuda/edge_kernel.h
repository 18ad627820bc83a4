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

  // Numbers of a block in front of its warps', `front`, and of a warp behind its edges, `rest`; warps beyond
  // `most_warps` get no edges.
  Failure prepare(const DevicePlan<R>& plan, const ConvArgs<R>& args, Needs needs, int64_t front, int64_t rest,
                  int64_t most_warps) {
    call.args = args, call.args.plan = nullptr, call.plan = plan.view, call.extent = plan.extent,
    call.places = plan.places, call.terms = plan.terms;
    LaunchFacts found{};
    IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found,
                         [&] { return ask(plan, needs, front, rest, found); }));
    Shape& shape = call.shape;
    shape = found.shape, warps_per_block = found.warps_per_block;
    const int64_t tile = 32 / shape.lanes, most = std::max<int64_t>(std::min(found.resident, most_warps), 1);
    const int64_t tiles = (args.n_edges + tile - 1) / tile;
    shape.edges_per_warp = std::max<int64_t>((tiles + most - 1) / most, 1) * tile;
    shape.warps = static_cast<int>((args.n_edges + shape.edges_per_warp - 1) / shape.edges_per_warp);
    return {};
  }

  Failure ask(const DevicePlan<R>& plan, Needs needs, int64_t front, int64_t rest, LaunchFacts& found) {
    Device device;
    IST_TRY(device.read());
    Shape& shape = found.shape;
    const int64_t front_bytes = kBlockBytes + static_cast<int64_t>(sizeof(N)) * front;
    shape = best_shape<N>(plan.view, plan.extent, needs, rest, device, front_bytes);
    shape.block_size = static_cast<int>(front);
    const int64_t warp_bytes = static_cast<int64_t>(sizeof(N)) * shape.warp_size;
    const int64_t warps = std::min<int64_t>(kThreads / 32, (device.block_bytes - front_bytes) / warp_bytes);
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
    return kBlockBytes + static_cast<int64_t>(sizeof(N)) * (shape.block_size + warps * shape.warp_size);
  }

  Failure run(void* stream) const {
    const dim3 grid((call.shape.warps + warps_per_block - 1) / warps_per_block);
    const int64_t bytes = block_bytes(call.shape, warps_per_block);
    return launch(name, kernel, grid, dim3(32 * warps_per_block), bytes, stream, call);
  }
};

// run(sizes, numbers of a block in front of its warps'): those of the plan where its numbers are single floats.
template <typename N, typename Run>
Failure with_sizes(const DevicePlan<Real<N>>& plan, Run run) {
  if constexpr (!std::is_same_v<N, float>) {
    return run(Generic{}, 0);
  } else {
    const auto run_for = [&](auto sizes) {
      return run(sizes, SpecialisedLayers<decltype(sizes), float>::size(plan.host));
    };
    switch (plan.sizes) {
      case Sizes::kAny:
        return run(Generic{}, 0);
      case Sizes::kElu4x8:
        return run_for(Specialised<Elu, 4, 8>{});
      case Sizes::kElu6x8:
        return run_for(Specialised<Elu, 6, 8>{});
      case Sizes::kSilu4x8:
        return run_for(Specialised<Silu, 4, 8>{});
      case Sizes::kSilu6x8:
        return run_for(Specialised<Silu, 6, 8>{});
    }
    return {"with_sizes", "there is no kernel for these sizes"};
  }
}

}  // namespace implicit_steer::IST_ISA
