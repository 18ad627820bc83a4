// T[o, v, w] = Σ_e h_e[row, w] t_e[o, v], t_e[o, v] = Σ_i f_j[i, v] G_e[i, o] of all paths (tile_plan.h) by tensor
// cores. A block takes the edges of its nodes 32 at a time: first all threads make G (tile_block.cuh), then every warp
// sums some paths over the edges of one node after another, 8 at a time, a step:
//
//   A[(o, v), edge] = t[o, v],   B[edge, w] = h[w]
//
// Lane 4 g + t computes t of channels v = g, and v = 8 + g, for edges 2 t and 2 t + 1 of the step, in the place where
// A's fragment has them.
#pragma once

#include "lanes_of_warp.cuh"
#include "mma.cuh"
#include "tile_block.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kSumEdges = 32;  // at a time

struct TileSums : TileBlock<kSumEdges> {
  using Base = TileBlock<kSumEdges>;
  using Base::Base;

  static IST_HOST_DEVICE int64_t size(const TileView& tiles) { return Base::numbers + tiles.of_edge() * kSumEdges; }

  __device__ __forceinline__ void run() {
    const int end = n_edges();
    for (int from = 0; from < end; from += kSumEdges) {  // loop: chunks
      const int n = end - from < kSumEdges ? end - from : kSumEdges;
      enter(from, n, direction(from, n), nullptr);
      for (int k = warp; k < call.tiles.n_items; k += kTileWarps) {
        const TileItem item = global_memory(call.tiles.items)[k];
        const TilePath path = global_memory(call.tiles.paths)[item.path];
        TileRun run = next_run(from, n, 0, node);
        for (; run.begin < n; run = next_run(from, n, run.stop, run.node)) {  // loop: nodes
          if (item.blocks == 1)
            sum_path<1>(path, item, record(from), run);
          else
            sum_path<2>(path, item, record(from), run);
        }
      }
      __syncthreads();
    }
    clear_bare_nodes();
  }

  // `records`: of the chunk
  template <int kBlocks>
  __device__ __forceinline__ void sum_path(const TilePath& path, const TileItem& item, const float* records,
                                           const TileRun& run) const {
    switch (path.shape) {
      case tile_shape(1, 1, true, true):
        return sum_constant<1, true, kBlocks>(path, item, records, run);
      case tile_shape(3, 3, true, true):
        return sum_constant<3, true, kBlocks>(path, item, records, run);
      case tile_shape(5, 5, true, true):
        return sum_constant<5, true, kBlocks>(path, item, records, run);
      case tile_shape(3, 3, false, true):
        return sum_constant<3, false, kBlocks>(path, item, records, run);
      case tile_shape(5, 5, false, true):
        return sum_constant<5, false, kBlocks>(path, item, records, run);
      case tile_shape(1, 1, true, false):
        return sum_products<1, 1, true, kBlocks>(path, item, records, run);
      case tile_shape(3, 3, true, false):
        return sum_products<3, 3, true, kBlocks>(path, item, records, run);
      case tile_shape(5, 5, true, false):
        return sum_products<5, 5, true, kBlocks>(path, item, records, run);
      case tile_shape(1, 3, false, false):
        return sum_products<1, 3, false, kBlocks>(path, item, records, run);
      case tile_shape(1, 5, false, false):
        return sum_products<1, 5, false, kBlocks>(path, item, records, run);
      case tile_shape(3, 1, false, false):
        return sum_products<3, 1, false, kBlocks>(path, item, records, run);
      case tile_shape(3, 3, false, false):
        return sum_products<3, 3, false, kBlocks>(path, item, records, run);
      case tile_shape(3, 5, false, false):
        return sum_products<3, 5, false, kBlocks>(path, item, records, run);
      case tile_shape(5, 1, false, false):
        return sum_products<5, 1, false, kBlocks>(path, item, records, run);
      case tile_shape(5, 3, false, false):
        return sum_products<5, 3, false, kBlocks>(path, item, records, run);
      case tile_shape(5, 5, false, false):
        return sum_products<5, 5, false, kBlocks>(path, item, records, run);
    }
  }

  // T[o, v, 0] of the run's node is `sums()[o * step()]`
  __device__ __forceinline__ float* sums(const TilePath& path, const TileRun& run) const {
    return opaque(wide.sums + wide.at(path.at, first_node + run.node, path.size));
  }

  // t of edges `at` + 2 pair and the next one; 0 of edges outside of the run.
  template <int kOut, int kBlocks>
  struct Products {
    float t[2][kBlocks][kOut] = {};
    int place[2];  // in the chunk; that of another one in place of an edge outside
  };
  // `x`: features of this lane's channel, of source 0
  template <int kIn, int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void products(const TilePath& path, const float* x, const TileRun& run, int at,
                                           Products<kOut, kBlocks>& of) const {
    const float* const of_g = g() + path.g * kSumEdges + at + 2 * pair;
    float f[kIn][2][kBlocks];
    bool there[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int mine = at + 2 * pair + e;
      there[e] = mine >= run.begin && mine < run.stop;
      of.place[e] = there[e] ? mine : run.begin;
      const float* const x_e = x + int64_t{sources[of.place[e]]} * wide.plan.n_gathered;
#pragma unroll
      for (int i = 0; i < kIn; ++i)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) f[i][e][b] = x_e[i * path.in_stride + 8 * b];
    }
#pragma unroll
    for (int i = 0; i < kIn; ++i)
#pragma unroll
      for (int o = kDiagonal ? i : 0; o < (kDiagonal ? i + 1 : kOut); ++o) {
        const auto two = neighbours<2>(of_g + (kDiagonal ? o : i * kOut + o) * kSumEdges);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) of.t[e][b][o] += f[i][e][b] * two.at[e];
      }
    if (at >= run.begin && at + 8 <= run.stop) return;
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int o = 0; o < kOut; ++o) of.t[e][b][o] = there[e] ? of.t[e][b][o] : 0;
  }
  __device__ __forceinline__ const float* features(const TilePath& path, const TileItem& item) const {
    return opaque(wide.x + (path.from + item.v + group));
  }

  template <int kIn, int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void sum_products(const TilePath& path, const TileItem& item, const float* records,
                                               const TileRun& run) const {
    constexpr int rows = kOut * kBlocks, tiles = (rows + 1) / 2;
    const float *const x = features(path, item), *const of_w = opaque(records + (path.row + item.w + group));
    float sum[tiles][4] = {};
#pragma unroll 1
    for (int at = run.begin & -8; at < run.stop; at += 8) {  // loop: T
      Products<kOut, kBlocks> of;
      products<kIn, kOut, kDiagonal>(path, x, run, at, of);
      Split<2> h;
#pragma unroll
      for (int e = 0; e < 2; ++e) h.set(e, of_w[int64_t{of.place[e]} * call.tiles.record]);
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        Split<4> tile;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 2 * m + i % 2;
          tile.set(i, row < rows ? of.t[i / 2][row % kBlocks][row / kBlocks] : 0);
        }
        mma_3xtf32(sum[m], tile, h);
      }
    }
    const int64_t next = step(path);
    const int width = call.tiles.width;
    float* const to = sums(path, run) + (item.v + group) * width + item.w + 2 * pair;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (item.v + 8 * b + group >= path.channels) continue;
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const int row = o * kBlocks + b;
        auto& two = neighbours<2>(to + o * next + 8 * b * width);
        const Neighbours<float, 2> made{sum[row / 2][row % 2 * 2], sum[row / 2][row % 2 * 2 + 1]};
        two = run.goes_on ? sum_of(two, made) : made;
      }
    }
  }

  // With the edges' radial factors in place of h
  template <int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void sum_constant(const TilePath& path, const TileItem& item, const float* records,
                                               const TileRun& run) const {
    const float* const x = features(path, item);
    float sum[kBlocks][kOut] = {};
#pragma unroll 1
    for (int at = run.begin & -8; at < run.stop; at += 8) {  // loop: constant T
      Products<kOut, kBlocks> of;
      products<kOut, kOut, kDiagonal>(path, x, run, at, of);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float factor = records[(of.place[e] + 1) * call.tiles.record - 1];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int o = 0; o < kOut; ++o) sum[b][o] += factor * of.t[e][b][o];
      }
    }
    const int64_t next = step(path);
    float* const to = sums(path, run) + item.v + group;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const float whole = sum_lanes(sum[b][o], 1, 4);
        float& one = to[o * next + 8 * b];
        if (pair == 0 && item.v + 8 * b + group < path.size) one = run.goes_on ? one + whole : whole;
      }
  }

  __device__ __forceinline__ void clear_bare_nodes() const {
    for (int at = 0; at < nodes; ++at) {
      if (bounds[at] != bounds[at + 1]) continue;
      for (int s = 0; s < wide.lists.n_slots; ++s) {
        const WideSlot& slot = wide.lists.slots[s];
        float* const of_slot = wide.sums + wide.at(slot.at, first_node + at, slot.size);
        for (int k = threadIdx.x; k < slot.size; k += kTileThreads) of_slot[k] = 0;
      }
    }
  }
};

__global__ void __launch_bounds__(kTileThreads) tile_sums(const __grid_constant__ TileCall call) {
  SHARED_MEMORY(float, memory);
  TileSums(call, memory).run();
}

}  // namespace implicit_steer::IST_ISA
