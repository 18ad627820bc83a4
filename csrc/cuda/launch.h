// Host side of launches: errors by kernel, and how a warp's memory and edges are laid out.
#pragma once

#include "compat.cuh"
#include "library.h"
#include "warp.cuh"

namespace implicit_steer::IST_ISA {

inline Failure failure(const char* name, cudaError_t error) {
  return {name, error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

#define IST_TRY(expression) \
  if (const Failure failed = expression; failed.reason) return failed

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

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    return 0;
  return value;
}

// Warps that a multiprocessor should hold: as many as the registers of kernels for float allow. Fewer edges at a time,
// where their memory would not.
constexpr int64_t kWarps = 12;

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

template <typename N>
Shape best_shape(const PlanView<Real<N>>& plan, const Extent& extent, Needs needs, int64_t rest) {
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kWarps;
  for (int lanes = 4;; lanes *= 2) {
    const Shape shape = shape_of<N>(plan, extent, needs, rest, lanes);
    if (lanes == 32 || static_cast<int64_t>(sizeof(N)) * shape.warp_size <= most) return shape;
  }
}

}  // namespace implicit_steer::IST_ISA
