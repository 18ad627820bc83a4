// A launch of an exact or a grid kernel.
#pragma once

#include <algorithm>

#include "device_plan.h"
#include "field_call.h"
#include "launch.h"

namespace implicit_steer::IST_ISA {

// A launch of blocks whose warps share the edges.
struct FieldLaunch {
  const char* name;
  void (*kernel)(FieldCall);
  FieldCall call;
  int64_t front, of_warp;  // numbers of a block's shared memory: in front of its warps', and of a warp
  int warps_per_block;
  int most_warps = kThreads / 32;  // of a block
  int64_t node_sum = 0;            // forward: numbers of a row of ConvArgs.node_sums

  // Warps beyond `most_of_grid` get no edges.
  Failure prepare(const DevicePlan<float>& plan, const ConvArgs<float>& args, int64_t most_of_grid) {
    call.args = args, call.args.plan = nullptr, call.plan = plan.view, call.view = plan.fields_view;
    LaunchFacts found{};
    IST_TRY(plan.prepare(reinterpret_cast<const void*>(kernel), found, [&] { return ask(found); }));
    const int64_t most = std::max<int64_t>(std::min(found.resident, most_of_grid), 1),
                  chunks = (args.n_edges + 31) / 32;
    Shape& shape = call.shape;
    shape.edges_per_warp = std::max<int64_t>((chunks + most - 1) / most, 1) * 32;
    shape.warps = static_cast<int>((args.n_edges + shape.edges_per_warp - 1) / shape.edges_per_warp);
    warps_per_block = found.warps_per_block;
    return {};
  }

  // Of a forward pass that is prepared: for its partial rows, and for what it finishes nodes with, bias [C_out] and
  // arrivals [warps].
  void give_memory() {
    const int64_t warps = call.shape.warps, width = call.plan.out_size, n = 2 * warps * width + width + warps;
    call.partial =
        static_cast<float*>(call.args.scratch(std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(float))));
  }

  Failure ask(LaunchFacts& found) const {
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

}  // namespace implicit_steer::IST_ISA
