// T[o, v, w] = Σ_e h_e[row, w] t_e[o, v], t_e[o, v] = Σ_i f_j[i, v] G_e[i, o] of all paths (tile_plan.h) by tensor cores.
// A block has some nodes, whose edges lie side by side, 32 of them at a time: first all threads make G
// (tile_geometry.cuh), then every warp sums some paths over the edges of one node after another, 8 at a time, a step:
//
//   A[(o, v), edge] = t[o, v],   B[edge, w] = h[w]
//
// Lane 4 g + t computes t of channels v = g, and v = 8 + g, for edges 2 t and 2 t + 1 of the step, in the place where A's
// fragment has them.
#pragma once

#include "lanes_of_warp.cuh"
#include "mma.cuh"
#include "tile_geometry.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kSumEdges = 32;  // at a time

struct TileSums {
  const TileCall& call;
  const WideCall<float>& wide;
  const TileGeometry<kSumEdges> geometry;
  int32_t* const sources;  // [32] of the chunk's edges
  const int lane, group, pair;
  const int64_t begin, last;  // the block's nodes
  int64_t node;               // into which the chunk's first edge goes
  int64_t from = 0;           // position of the chunk's first edge

  static IST_HOST_DEVICE int64_t size(const TileView& tiles) { return (tiles.of_edge() + 1) * kSumEdges; }

  __device__ __forceinline__ TileSums(const TileCall& call, float* memory)
      : call(call),
        wide(call.wide),
        geometry(call, memory),
        sources(reinterpret_cast<int32_t*>(memory + call.tiles.of_edge() * kSumEdges)),
        lane(threadIdx.x % 32),
        group(lane / 4),
        pair(lane % 4),
        begin(int64_t{blockIdx.x} * call.nodes_per_block),
        last(begin + call.nodes_per_block < wide.n_nodes ? begin + call.nodes_per_block : wide.n_nodes),
        node(begin) {}

  __device__ __forceinline__ void run() {
    const int64_t end = wide.first_edge(last);
    for (from = wide.first_edge(begin); from < end; from += kSumEdges) {  // loop: chunks
      const int n = end - from < kSumEdges ? static_cast<int>(end - from) : kSumEdges;
      if (threadIdx.x < kSumEdges) {
        const int64_t edge = wide.args.index(wide.args.order, from + (lane < n ? lane : n - 1));
        sources[lane] = static_cast<int32_t>(wide.args.index(wide.args.src, edge));
      }
      geometry.evaluate(geometry.direction(from, n));
      while (wide.first_edge(node + 1) <= from) ++node;
      for (int k = static_cast<int>(threadIdx.x) / 32; k < call.tiles.n_items; k += kTileWarps)
        sum_item(global_memory(call.tiles.items)[k], n);
      __syncthreads();
    }
    clear_bare_nodes();
  }

  __device__ __forceinline__ void sum_item(const TileItem& item, int n) const {
    const TilePath& path = global_memory(call.tiles.paths)[item.path];
    int64_t at = node;
    for (int64_t start = from; start < from + n; ++at) {  // loop: nodes
      const int64_t end = wide.first_edge(at + 1), stop = end < from + n ? end : from + n;
      if (stop <= start) continue;
      const Run run{static_cast<int>(start - from), static_cast<int>(stop - from), at, wide.first_edge(at) < from};
      item.blocks == 1 ? sum_path<1>(path, item.v, run) : sum_path<2>(path, item.v, run);
      start = stop;
    }
  }

  // Edges begin .. stop - 1 of the chunk, into a node that has others in an earlier chunk, or not.
  struct Run {
    int begin, stop;
    int64_t node;
    bool goes_on;
  };
  template <int kBlocks>
  __device__ __forceinline__ void sum_path(const TilePath& path, int v, const Run& run) const {
    if (path.n_out == 1)
      path.row < 0 ? sum_constant<1, kBlocks>(path, v, run) : sum_products<1, kBlocks>(path, v, run);
    else if (path.n_out == 3)
      path.row < 0 ? sum_constant<3, kBlocks>(path, v, run) : sum_products<3, kBlocks>(path, v, run);
    else
      path.row < 0 ? sum_constant<5, kBlocks>(path, v, run) : sum_products<5, kBlocks>(path, v, run);
  }

  // t of edges step + 2 pair and the next one; 0 of edges outside of the run.
  template <int kOut, int kBlocks>
  struct Products {
    float t[2][kBlocks][kOut] = {};
    int place[2];  // in the chunk; that of another one in place of an edge outside
    bool there[2];
  };
  template <int kOut, int kBlocks>
  __device__ __forceinline__ void products(const TilePath& path, int v, const Run& run, int step,
                                           Products<kOut, kBlocks>& of) const {
    const float* x[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = step + 2 * pair + e;
      of.there[e] = at >= run.begin && at < run.stop;
      of.place[e] = of.there[e] ? at : run.begin;
      x[e] = wide.x + int64_t{sources[of.place[e]]} * wide.plan.n_gathered + path.from + v + group;
    }
    const float* g = geometry.g + path.g * kSumEdges + step + 2 * pair;
#pragma unroll 1
    for (int i = 0; i < path.n_in; ++i, g += kOut * kSumEdges) {
      float f[2][kBlocks];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) f[e][b] = x[e][i * path.in_stride + 8 * b];
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const auto two = neighbours<2>(g + o * kSumEdges);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) of.t[e][b][o] += f[e][b] * two.at[e];
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int o = 0; o < kOut; ++o) of.t[e][b][o] = of.there[e] ? of.t[e][b][o] : 0;
  }

  template <int kOut, int kBlocks>
  __device__ __forceinline__ void sum_products(const TilePath& path, int v, const Run& run) const {
    constexpr int rows = kOut * kBlocks, tiles = (rows + 1) / 2;
    float sums[tiles][4] = {};
#pragma unroll 1
    for (int step = run.begin & -8; step < run.stop; step += 8) {  // loop: T
      Products<kOut, kBlocks> of;
      products(path, v, run, step, of);
      Split<2> h;
#pragma unroll
      for (int e = 0; e < 2; ++e) h.set(e, call.rows[(from + of.place[e]) * call.tiles.record + path.row + group]);
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        Split<4> tile;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 2 * m + i % 2;
          tile.set(i, row < rows ? of.t[i / 2][row % kBlocks][row / kBlocks] : 0);
        }
        mma_3xtf32(sums[m], tile, h);
      }
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const int channel = v + row % kBlocks * 8 + group;
      if (channel >= path.channels) continue;
      auto& to = neighbours<2>(wide.sums + wide.at(path.at + row / kBlocks * path.size, run.node, path.size) +
                               channel * TilePlan::kWidth + 2 * pair);
      const Neighbours<float, 2> sum{sums[row / 2][row % 2 * 2], sums[row / 2][row % 2 * 2 + 1]};
      to = run.goes_on ? sum_of(to, sum) : sum;
    }
  }

  // With the edges' radial factors in place of h
  template <int kOut, int kBlocks>
  __device__ __forceinline__ void sum_constant(const TilePath& path, int v, const Run& run) const {
    float sums[kBlocks][kOut] = {};
#pragma unroll 1
    for (int step = run.begin & -8; step < run.stop; step += 8) {
      Products<kOut, kBlocks> of;
      products(path, v, run, step, of);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float factor = call.rows[(from + of.place[e] + 1) * call.tiles.record - 1];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int o = 0; o < kOut; ++o) sums[b][o] += factor * of.t[e][b][o];
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const float sum = sum_lanes(sums[b][o], 1, 4);
        float& to = wide.sums[wide.at(path.at + o * path.size, run.node, path.size) + v + 8 * b + group];
        if (pair == 0 && v + 8 * b + group < path.size) to = run.goes_on ? to + sum : sum;
      }
  }

  __device__ __forceinline__ void clear_bare_nodes() const {
    for (int64_t at = begin; at < last; ++at) {
      if (wide.first_edge(at) != wide.first_edge(at + 1)) continue;
      for (int s = 0; s < wide.lists.n_slots; ++s) {
        const WideSlot& slot = wide.lists.slots[s];
        for (int k = threadIdx.x; k < slot.size; k += kTileThreads) wide.sums[wide.at(slot.at, at, slot.size) + k] = 0;
      }
    }
  }
};

__global__ void __launch_bounds__(kTileThreads) tile_sums(const __grid_constant__ TileCall call) {
  SHARED_MEMORY(float, memory);
  TileSums(call, memory).run();
}

}  // namespace implicit_steer::IST_ISA
