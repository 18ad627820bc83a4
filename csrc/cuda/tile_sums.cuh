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

template <typename N>
struct TileSums : TileBlock<N, kSumEdges> {
  using Base = TileBlock<N, kSumEdges>;
  using Base::Base, Base::call, Base::wide, Base::lane, Base::group, Base::pair, Base::warp, Base::first_node;
  using Base::nodes, Base::bounds, Base::sources, Base::node;

  static IST_HOST_DEVICE int64_t size(const TileView& tiles) { return Base::numbers + tiles.of_edge() * kSumEdges; }

  __device__ __forceinline__ void run() {
    const int end = this->n_edges();
    for (int from = 0; from < end; from += kSumEdges) {  // loop: chunks
      const int n = end - from < kSumEdges ? end - from : kSumEdges;
      this->enter(from, n, this->direction(from, n), nullptr);
      for (int k = warp; k < call.tiles.n_items; k += kTileWarps) {
        const TileItem item = global_memory(call.tiles.items)[k];
        const TilePath path = global_memory(call.tiles.paths)[item.path];
        TileRun run = this->next_run(from, n, 0, node);
        for (; run.begin < n; run = this->next_run(from, n, run.stop, run.node)) {  // loop: nodes
          if (item.blocks == 1)
            sum_path<1>(path, item, this->record(from), run);
          else
            sum_path<2>(path, item, this->record(from), run);
        }
      }
      __syncthreads();
    }
    clear_bare_nodes();
  }

  // `records`: of the chunk
  template <int kBlocks>
  __device__ __forceinline__ void sum_path(const TilePath& path, const TileItem& item, const N* records,
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

  // Of an element of T floats: a pair of tangent and value, or the tangent alone (WideCall).
  __device__ __forceinline__ int parts() const {
    if constexpr (is_dual<N>) return wide.tangents_only ? 1 : 2;
    return 1;
  }
  // T[o, v, 0] of the run's node begins at `sums()[parts() * o * step()]`
  __device__ __forceinline__ float* sums(const TilePath& path, const TileRun& run) const {
    return opaque(wide.sums + parts() * wide.at(path.at, first_node + run.node, path.size));
  }
  // n elements of T, side by side; `goes_on`: added to those that are there.
  template <int n>
  __device__ __forceinline__ void put(float* to, const N (&made)[n], bool goes_on) const {
    if constexpr (is_dual<N>) {
      if (!wide.tangents_only) {
        Neighbours<float, 2 * n> pairs;
#pragma unroll
        for (int k = 0; k < n; ++k) pairs.at[2 * k] = made[k].tangent, pairs.at[2 * k + 1] = made[k].value;
        return put(neighbours<2 * n>(to), pairs, goes_on);
      }
    }
    Neighbours<float, n> numbers;
#pragma unroll
    for (int k = 0; k < n; ++k) numbers.at[k] = result(made[k]);
    put(neighbours<n>(to), numbers, goes_on);
  }
  template <int n>
  static __device__ __forceinline__ void put(Neighbours<float, n>& to, Neighbours<float, n> made, bool goes_on) {
    to = goes_on ? sum_of(to, made) : made;
  }

  // t of edges `at` + 2 pair and the next one; 0 of edges outside of the run.
  template <int kOut, int kBlocks>
  struct Products {
    N t[2][kBlocks][kOut] = {};
    int place[2];  // in the chunk; that of another one in place of an edge outside
  };
  // `x`: features of this lane's channel, of source 0
  template <int kIn, int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void products(const TilePath& path, const N* x, const TileRun& run, int at,
                                           Products<kOut, kBlocks>& of) const {
    const N* const of_g = this->g() + path.g * kSumEdges + at + 2 * pair;
    N f[kIn][2][kBlocks];
    bool there[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int mine = at + 2 * pair + e;
      there[e] = mine >= run.begin && mine < run.stop;
      of.place[e] = there[e] ? mine : run.begin;
      const N* const x_e = x + int64_t{sources[of.place[e]]} * wide.plan.n_gathered;
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
        for (int o = 0; o < kOut; ++o) of.t[e][b][o] = there[e] ? of.t[e][b][o] : N{};
  }
  __device__ __forceinline__ const N* features(const TilePath& path, const TileItem& item) const {
    return opaque(wide.x + (path.from + item.v + group));
  }

  template <int kIn, int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void sum_products(const TilePath& path, const TileItem& item, const N* records,
                                               const TileRun& run) const {
    constexpr int rows = kOut * kBlocks, tiles = (rows + 1) / 2;
    const N *const x = features(path, item), *const of_w = opaque(records + (path.row + item.w + group));
    ProductSum<N> sum[tiles];
#pragma unroll 1
    for (int at = run.begin & -8; at < run.stop; at += 8) {  // loop: T
      Products<kOut, kBlocks> of;
      products<kIn, kOut, kDiagonal>(path, x, run, at, of);
      OfParts<Split<2>, N> h;
#pragma unroll
      for (int e = 0; e < 2; ++e) h.set(e, of_w[int64_t{of.place[e]} * call.tiles.record]);
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        OfParts<Split<4>, N> tile;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 2 * m + i % 2;
          tile.set(i, row < rows ? of.t[i / 2][row % kBlocks][row / kBlocks] : N{});
        }
        sum[m].add(tile, h, wide.tangents_only);
      }
    }
    const int64_t next = this->step(path);
    const int width = call.tiles.width;
    float* const to = sums(path, run) + parts() * ((item.v + group) * width + item.w + 2 * pair);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (item.v + 8 * b + group >= path.channels) continue;
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const int row = o * kBlocks + b, first = row % 2 * 2;
        put(to + parts() * (o * next + 8 * b * width), {sum[row / 2][first], sum[row / 2][first + 1]}, run.goes_on);
      }
    }
  }

  // With the edges' radial factors in place of h
  template <int kOut, bool kDiagonal, int kBlocks>
  __device__ __forceinline__ void sum_constant(const TilePath& path, const TileItem& item, const N* records,
                                               const TileRun& run) const {
    const N* const x = features(path, item);
    N sum[kBlocks][kOut] = {};
#pragma unroll 1
    for (int at = run.begin & -8; at < run.stop; at += 8) {  // loop: constant T
      Products<kOut, kBlocks> of;
      products<kOut, kOut, kDiagonal>(path, x, run, at, of);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const N factor = records[(of.place[e] + 1) * call.tiles.record - 1];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int o = 0; o < kOut; ++o) sum[b][o] += factor * of.t[e][b][o];
      }
    }
    const int64_t next = this->step(path);
    float* const to = sums(path, run) + parts() * (item.v + group);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const N whole[1] = {sum_lanes(sum[b][o], 1, 4)};
        if (pair == 0 && item.v + 8 * b + group < path.size) put(to + parts() * (o * next + 8 * b), whole, run.goes_on);
      }
  }

  __device__ __forceinline__ void clear_bare_nodes() const {
    for (int at = 0; at < nodes; ++at) {
      if (bounds[at] != bounds[at + 1]) continue;
      for (int s = 0; s < wide.lists.n_slots; ++s) {
        const WideSlot& slot = wide.lists.slots[s];
        float* const of_slot = wide.sums + parts() * wide.at(slot.at, first_node + at, slot.size);
        for (int k = threadIdx.x; k < parts() * slot.size; k += kTileThreads) of_slot[k] = 0;
      }
    }
  }
};

template <typename N>
__global__ void __launch_bounds__(kTileThreads, is_dual<N> ? 2 : 0)
    tile_sums(const __grid_constant__ TileCall<N> call) {
  SHARED_MEMORY(N, memory);
  TileSums<N>(call, memory).run();
}

}  // namespace implicit_steer::IST_ISA
