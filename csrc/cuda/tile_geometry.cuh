// The direction's part of the products of a chunk of edges, in a block's shared memory: monomials, harmonics Y, and
// G = Σ value · Y of all paths; and the way back. Threads have one edge each and share the rows.
#pragma once

#include "neighbours.cuh"
#include "tile_call.h"

namespace implicit_steer::IST_ISA {

template <int kEdges>
struct TileGeometry {
  static constexpr int shares = kTileThreads / kEdges;
  const TileCall& call;
  const int edge, share;                               // of this thread
  float *const monomials, *const harmonics, *const g;  // [n, kEdges]

  __device__ __forceinline__ TileGeometry(const TileCall& call, float* memory)
      : call(call),
        edge(threadIdx.x % kEdges),
        share(threadIdx.x / kEdges),
        monomials(memory),
        harmonics(monomials + call.tiles.n_monomials * kEdges),
        g(harmonics + call.tiles.harmonics.n * kEdges) {}

  // Direction and factor of this thread's one of n edges from a position on; beyond the last edge those of the last.
  __device__ __forceinline__ Neighbours<float, 4> direction(int64_t begin, int n) const {
    return neighbours<4>(call.rows + (begin + (edge < n ? edge : n - 1) + 1) * call.tiles.record - 4);
  }

  // By all threads, with barriers.
  __device__ __forceinline__ void evaluate(const Neighbours<float, 4>& u) const {
    if (share == 0) evaluate_monomials(u);
    __syncthreads();
    multiply(call.tiles.harmonics, monomials, harmonics);
    __syncthreads();
    multiply(call.tiles.g, harmonics, g);
    __syncthreads();
  }

  __device__ __forceinline__ void evaluate_monomials(const Neighbours<float, 4>& u) const {
    float* const of_edge = monomials + edge;
    const int32_t* const list = global_memory(call.tiles.monomials);
    of_edge[0] = 1;
    for (int k = 1; k < call.tiles.n_monomials; ++k) {
      const int axis = list[2 * k + 1];
      of_edge[k * kEdges] = of_edge[list[2 * k] * kEdges] * (axis == 0 ? u.at[0] : axis == 1 ? u.at[1] : u.at[2]);
    }
  }

  // y = M x, edge by edge
  __device__ __forceinline__ void multiply(const TileMatrix& matrix, const float* x, float* y) const {
    const int32_t *const first = global_memory(matrix.first), *const column = global_memory(matrix.column);
    const float* const value = global_memory(matrix.value);
    for (int row = share; row < matrix.n; row += shares) {
      float sum = 0;
      for (int k = first[row]; k < first[row + 1]; ++k)
        sum += value[k] * (column[k] < 0 ? 1 : x[column[k] * kEdges + edge]);
      y[row * kEdges + edge] = sum;
    }
  }

  // The gradient of the direction from that of G, which has the layout of `memory`, as have those of harmonics and
  // monomials on the way; of the threads with share 0. By all threads, with barriers.
  __device__ __forceinline__ Neighbours<float, 4> backward(const Neighbours<float, 4>& u, const TileGeometry& d) const {
    multiply(call.tiles.of_harmonics, d.g, d.harmonics);
    __syncthreads();
    multiply(call.tiles.of_monomials, d.harmonics, d.monomials);
    __syncthreads();
    Neighbours<float, 4> d_u{};
    if (share != 0) return d_u;
    const int32_t* const list = global_memory(call.tiles.monomials);
    for (int k = call.tiles.n_monomials - 1; k > 0; --k) {
      const int earlier = list[2 * k] * kEdges + edge, axis = list[2 * k + 1];
      const float d_k = d.monomials[k * kEdges + edge];
      d.monomials[earlier] += d_k * (axis == 0 ? u.at[0] : axis == 1 ? u.at[1] : u.at[2]);
#pragma unroll
      for (int m = 0; m < 3; ++m) d_u.at[m] += axis == m ? d_k * monomials[earlier] : 0;
    }
    return d_u;
  }
};

}  // namespace implicit_steer::IST_ISA
