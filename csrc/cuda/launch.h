// Host side of launches: the device they are for, and how a warp's memory and edges are laid out.
#pragma once

#include "compat.cuh"
#include "failure.h"
#include "warp.cuh"

namespace implicit_steer::IST_ISA {

template <typename Kernel, typename... Arguments>
Failure launch(const char* name, Kernel kernel, dim3 grid, dim3 block, int64_t bytes, void* stream,
               Arguments... arguments) {
  if (grid.x == 0) return {};
  LAUNCH(kernel, grid, block, bytes, static_cast<cudaStream_t>(stream), arguments...);
  return failure(name, cudaGetLastError());
}

// One thread for each of n.
template <typename Kernel, typename... Arguments>
Failure launch_threads(const char* name, Kernel kernel, int64_t n, void* stream, Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>((n + kThreads - 1) / kThreads));
  return launch(name, kernel, grid, dim3(kThreads), 0, stream, arguments...);
}

// All warps together have this much memory for their gradients of the weights: the 1,600 that an H100 holds, where
// there are up to 42,000 numbers of each; where there are more, fewer warps run.
constexpr int64_t kGradientBytes = int64_t{256} << 20;
template <typename R>
int64_t most_warps_with(int64_t numbers) {
  return kGradientBytes / (static_cast<int64_t>(sizeof(R)) * (numbers > 1 ? numbers : 1));
}
constexpr int64_t kAnyWarps = int64_t{1} << 30;

// The current device: shared memory of a block, of a multiprocessor, what of it each block takes for the system, in
// bytes; and multiprocessors.
struct Device {
  int block_bytes, bytes, reserved_bytes, multiprocessors;

  Failure read() {
    int number = 0;
    IST_TRY(failure("device", cudaGetDevice(&number)));
    const auto get = [&](int& value, cudaDeviceAttr attribute) {
      return failure("device", cudaDeviceGetAttribute(&value, attribute, number));
    };
    IST_TRY(get(block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    IST_TRY(get(bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    IST_TRY(get(reserved_bytes, cudaDevAttrReservedSharedMemoryPerBlock));
    return get(multiprocessors, cudaDevAttrMultiProcessorCount);
  }
};

// Of a warp whose edges are shared by `lanes` lanes each; `rest`: numbers behind the edges.
template <typename N>
Shape shape_of(const PlanView<Real<N>>& plan, const Extent& extent, Needs needs, int64_t rest, int lanes) {
  Slice<N> slice{nullptr};
  EdgeArrays<N> arrays;
  arrays.place(slice, plan, extent, needs);
  Shape shape{};
  shape.lanes = lanes;
  shape.edge_size = whole_quads(static_cast<int>(slice.used)) | 4;
  shape.warp_size = whole_quads(whole_quads(32 / lanes * shape.edge_size) + static_cast<int>(rest));
  return shape;
}

// With as many edges at a time as leave memory for the blocks that the registers of kernels for float allow.
template <typename N>
Shape best_shape(const PlanView<Real<N>>& plan, const Extent& extent, Needs needs, int64_t rest, const Device& device) {
  const int64_t most = (device.bytes / kResident<float> - device.reserved_bytes - kBlockBytes) / (kThreads / 32);
  for (int lanes = 4;; lanes *= 2) {
    const Shape shape = shape_of<N>(plan, extent, needs, rest, lanes);
    if (lanes == 32 || static_cast<int64_t>(sizeof(N)) * shape.warp_size <= most) return shape;
  }
}

}  // namespace implicit_steer::IST_ISA
