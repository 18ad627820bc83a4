// Backward of tile_sums.cuh, from dT in global memory: of every edge the gradients of its neighbour's features and of
// its record. A block has some nodes, 16 of their edges at a time: first all threads make G (tile_block.cuh), then, for
// a block or two of eight channels of one type of inputs after another, every warp takes some of the paths that read
// them (TileInput):
//
//   d_t[o, v] = Σ_w h[w] dT[o, v, w]      A[edge, w] = h[w],      B[w, v] = dT[o, v, w]
//   d_h[w] = Σ_{o, v} t[o, v] dT[o, v, w]   A[edge, v] = t[o, v],   B[v, w] = dT[o, v, w]
//
// Lane 4 g + t has edges g and 8 + g, and of a block channels 2 t and 2 t + 1. From d_t follow d_f[i, v] = Σ_o d_t G
// and d_G[i, o] = Σ_v d_t f. Every warp has a d_f of its own, which are added up in their order; d_h and d_G of a path
// are one warp's.
#pragma once

#include "lanes_of_warp.cuh"
#include "mma.cuh"
#include "tile_block.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kBackEdges = 16;  // at a time

template <typename N>
struct TileBackward : TileBlock<N, kBackEdges> {
  using Base = TileBlock<N, kBackEdges>;
  using Base::call, Base::wide, Base::lane, Base::group, Base::pair, Base::warp, Base::edge, Base::share, Base::rows;
  using Base::first_node, Base::start, Base::sources, Base::node, Base::shares, Base::step;
  N *const d_rows, *const d_h;                     // [of_edge, 16] as `rows`; [16, record - 4]
  N* const d_factor;                               // [16]
  int32_t* const edges;                            // [16] numbers of the chunk's edges
  float* const d_f;                                // [warps, blocks, most_in, 16, 8]; with tangents these alone
  static constexpr int of_block = kBackEdges * 8;  // numbers of a component's block

  static IST_HOST_DEVICE int64_t size(const TileView& tiles) {
    const int of_features = kTileWarps * of_warp(tiles) / static_cast<int>(sizeof(N) / sizeof(float));
    return Base::numbers + kBackEdges * (2 * tiles.of_edge() + tiles.record - 4 + 2) + of_features;
  }

  static IST_HOST_DEVICE int of_warp(const TileView& tiles) { return tiles.most_in * tiles.blocks * of_block; }

  __device__ __forceinline__ TileBackward(const TileCall<N>& call, N* memory)
      : Base(call, memory),
        d_rows(rows + call.tiles.of_edge() * kBackEdges),
        d_h(d_rows + call.tiles.of_edge() * kBackEdges),
        d_factor(d_h + (call.tiles.record - 4) * kBackEdges),
        edges(reinterpret_cast<int32_t*>(d_factor + kBackEdges)),
        d_f(reinterpret_cast<float*>(d_factor + 2 * kBackEdges)) {}

  // Asked of the call each time: kept, it would take a register.
  __device__ __forceinline__ bool need_rows() const { return call.grad_rows; }

  __device__ __forceinline__ void run() {
    const int end = this->n_edges();
    for (int from = 0; from < end; from += kBackEdges)  // loop: chunks
      chunk(from, end - from < kBackEdges ? end - from : kBackEdges);
  }

  __device__ __forceinline__ void chunk(int from, int n) {
    const int cleared = kBackEdges * (call.tiles.of_edge() + call.tiles.record - 4 + 1);  // d_rows, d_h, d_factor
#pragma unroll 1
    for (int k = 4 * threadIdx.x; k < cleared && need_rows(); k += 4 * kTileThreads) neighbours<4>(d_rows + k) = {};
    this->enter(from, n, this->direction(from, n), edges);
    for (int k = 0; k < call.tiles.n_inputs; ++k) {
      const TileInput input = global_memory(call.tiles.inputs)[k];
      float* const mine = d_f + warp * of_warp(call.tiles);
      static_assert(of_block == 4 * 32);
#pragma unroll 1
      for (int b = 0; b < input.blocks; ++b)
#pragma unroll 1
        for (int i = 0; i < input.n_in; ++i)
          neighbours<4>(mine + (b * call.tiles.most_in + i) * of_block + 4 * lane) = {};
      __syncwarp();
      const int32_t* const first = call.tiles.inputs[k].first + warp;
      for (int at = first[0]; at < first[1]; ++at) {
        const TilePath path = global_memory(call.tiles.paths)[global_memory(call.tiles.input_paths)[at]];
        const int together = may_pair(path.n_in, path.n_out) ? input.blocks : 1;
#pragma unroll 1
        for (int b = 0; b < input.blocks; b += together) {
          float* const of_path = mine + (b * call.tiles.most_in + path.component) * of_block;
          TileRun run = this->next_run(from, n, 0, node);
          for (; run.begin < n; run = this->next_run(from, n, run.stop, run.node))  // loop: nodes
            path_back(path, input.v + 8 * b, together, this->record(from), run, of_path);
        }
      }
      __syncthreads();
      if (wide.args.grad_edge) write_features(input, n);
      __syncthreads();
    }
    if (wide.args.grad_edge) clear_unread(n);
    if (need_rows()) write_rows(from, n);
    __syncthreads();
  }

  // ---- one path and one node's edges in the chunk

  // Of this lane: edges group and 8 + group, channels 2 pair and 2 pair + 1 of each of n blocks of eight; number 2 e +
  // k of four is of edge e and channel k.
  template <int kOut, int n>
  struct OfLane {
    N d_t[kOut][n][4], t[kOut][n][4] = {};
    int place[2];  // in the chunk; that of another one in place of an edge outside of the run
    bool there[2];
  };

  // `records`: of the chunk; `of_path`: the warp's d_f of the path's inputs
  __device__ __forceinline__ void path_back(const TilePath& path, int v, int blocks, const N* records,
                                            const TileRun& run, float* of_path) const {
    switch (path.shape) {
      case tile_shape(1, 1, true, true):
        return path_back<1, 1, true, true>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 3, true, true):
        return path_back<3, 3, true, true>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 5, true, true):
        return path_back<5, 5, true, true>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 3, false, true):
        return path_back<3, 3, false, true>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 5, false, true):
        return path_back<5, 5, false, true>(path, v, blocks, records, run, of_path);
      case tile_shape(1, 1, true, false):
        return path_back<1, 1, true, false>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 3, true, false):
        return path_back<3, 3, true, false>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 5, true, false):
        return path_back<5, 5, true, false>(path, v, blocks, records, run, of_path);
      case tile_shape(1, 3, false, false):
        return path_back<1, 3, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(1, 5, false, false):
        return path_back<1, 5, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 1, false, false):
        return path_back<3, 1, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 3, false, false):
        return path_back<3, 3, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(3, 5, false, false):
        return path_back<3, 5, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 1, false, false):
        return path_back<5, 1, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 3, false, false):
        return path_back<5, 3, false, false>(path, v, blocks, records, run, of_path);
      case tile_shape(5, 5, false, false):
        return path_back<5, 5, false, false>(path, v, blocks, records, run, of_path);
    }
  }
  template <int kIn, int kOut, bool kDiagonal, bool kConstant>
  __device__ __forceinline__ void path_back(const TilePath& path, int v, int blocks, const N* records,
                                            const TileRun& run, float* of_path) const {
    if constexpr (may_pair(kIn, kOut))
      if (blocks == 2) return blocks_back<kIn, kOut, kDiagonal, kConstant, 2>(path, v, records, run, of_path);
    blocks_back<kIn, kOut, kDiagonal, kConstant, 1>(path, v, records, run, of_path);
  }
  // Whether two blocks of channels are worked on together, as registers allow: they share G, h and their gradients.
  static __device__ __forceinline__ constexpr bool may_pair(int n_in, int n_out) {
    return !is_dual<N> && n_in <= 3 && n_out <= 3;
  }
  template <int kIn, int kOut, bool kDiagonal, bool kConstant, int n>
  __device__ __forceinline__ void blocks_back(const TilePath& path, int v, const N* records, const TileRun& run,
                                              float* of_path) const {
    OfLane<kOut, n> of;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = group + 8 * e;
      of.there[e] = at >= run.begin && at < run.stop;
      of.place[e] = of.there[e] ? at : run.begin;
    }
    const N* const d_sums = opaque(wide.grad_sums + wide.at(path.at, first_node + run.node, path.size));
    if constexpr (kConstant)
      constant_back(path, v, records, d_sums, of);
    else
      products_back(path, v, records, d_sums, of);
#pragma unroll
    for (int o = 0; o < kOut; ++o)
#pragma unroll
      for (int b = 0; b < n; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) of.d_t[o][b][j] = of.there[j / 2] ? of.d_t[o][b][j] : N{};
    inputs_back<kIn, kOut, kDiagonal>(path, v, !kConstant && need_rows(), of, of_path);
    if (!need_rows()) return;
    if constexpr (kConstant)
      factor_back(path, v, d_sums, of);
    else
      rows_back(path, v, d_sums, of);
  }

  template <int kOut, int n>
  __device__ __forceinline__ void products_back(const TilePath& path, int v, const N* records, const N* d_sums,
                                                OfLane<kOut, n>& of) const {
    const int64_t next = step(path);
    ProductSum<N> sum[kOut][n];
#pragma unroll 1
    for (int w = 2 * pair; w < call.tiles.width; w += 8) {
      OfParts<Split<4>, N> h;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto two = neighbours<2>(records + of.place[e] * call.tiles.record + path.row + w);
#pragma unroll
        for (int k = 0; k < 2; ++k) h.set(2 * k + e, two.at[k]);
      }
      const N* const of_channel = d_sums + (v + group) * call.tiles.width + w;
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int b = 0; b < n; ++b) {
          Neighbours<N, 2> two{};
          if (v + 8 * b + group < path.channels) two = neighbours<2>(of_channel + o * next + 8 * b * call.tiles.width);
          OfParts<Split<2>, N> d_t;
          d_t.set(0, two.at[0]), d_t.set(1, two.at[1]);
          sum[o][b].add(h, d_t);
        }
    }
#pragma unroll
    for (int o = 0; o < kOut; ++o)
#pragma unroll
      for (int b = 0; b < n; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) of.d_t[o][b][j] = sum[o][b][j];
  }
  template <int kOut, int n>
  __device__ __forceinline__ void constant_back(const TilePath& path, int v, const N* records, const N* d_sums,
                                                OfLane<kOut, n>& of) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const N factor = records[(of.place[e] + 1) * call.tiles.record - 1];
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int b = 0; b < n; ++b)
#pragma unroll
          for (int k = 0; k < 2; ++k) of.d_t[o][b][2 * e + k] = factor * constant_grad(path, v + 8 * b, d_sums, o, k);
    }
  }
  __device__ __forceinline__ N constant_grad(const TilePath& path, int v, const N* d_sums, int o, int k) const {
    const int channel = v + 2 * pair + k;
    return channel < path.channels ? d_sums[o * step(path) + channel] : N{};
  }

  // t, d_f and, if wanted, d_G
  template <int kIn, int kOut, bool kDiagonal, int n>
  __device__ __forceinline__ void inputs_back(const TilePath& path, int v, bool need_g, OfLane<kOut, n>& of,
                                              float* of_path) const {
    constexpr int outputs = kDiagonal ? 1 : kOut;
    const bool writes_g = pair < 2 && (pair ? of.there[1] : of.there[0]);
    const N* x[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      x[e] = wide.x + (path.from + v + 2 * pair) + int64_t{sources[of.place[e]]} * wide.plan.n_gathered;
    const N* const of_g = this->g() + path.g * kBackEdges + group;
    N* const d_g = d_rows + (of_g - rows) + 8 * (pair & 1);  // of the sum that this lane gets
    float* const to = of_path + group * 8 + 2 * pair;
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
      N factor[outputs][2], product[outputs][2] = {};
#pragma unroll
      for (int o = 0; o < outputs; ++o)
#pragma unroll
        for (int e = 0; e < 2; ++e) factor[o][e] = of_g[(i * outputs + o) * kBackEdges + 8 * e];
#pragma unroll
      for (int b = 0; b < n; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto f = neighbours<2>(x[e] + i * path.in_stride + 8 * b);
          Neighbours<float, 2> d_f{};
#pragma unroll
          for (int m = 0; m < outputs; ++m) {
            const int o = kDiagonal ? i : m;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              of.t[o][b][2 * e + k] += f.at[k] * factor[m][e];
              d_f.at[k] += result(of.d_t[o][b][2 * e + k] * factor[m][e]);
              product[m][e] += of.d_t[o][b][2 * e + k] * f.at[k];
            }
          }
          auto& sum = neighbours<2>(to + (b * call.tiles.most_in + i) * of_block + 64 * e);
          sum = sum_of(sum, d_f);
        }
      if (need_g) {
#pragma unroll
        for (int o = 0; o < outputs; ++o) {
          const N sum = sum_two(product[o]);
          if (writes_g) d_g[(i * outputs + o) * kBackEdges] += sum;
        }
      }
    }
  }

  // Sums of two numbers over the lanes of an edge: the first of even lanes, the second of odd ones.
  __device__ __forceinline__ N sum_two(const N (&x)[2]) const {
    const bool odd = pair & 1;
    const N sum = (odd ? x[1] : x[0]) + from_lane_xor(odd ? x[0] : x[1], 1);
    return sum + from_lane_xor(sum, 2);
  }

  template <int kOut, int n>
  __device__ __forceinline__ void rows_back(const TilePath& path, int v, const N* d_sums,
                                            const OfLane<kOut, n>& of) const {
    const int64_t next = step(path);
    const int width = call.tiles.width;
#pragma unroll 1
    for (int w = 0; w < width; w += 8) {
      const N* const of_channel = d_sums + (v + 2 * pair) * width + w + group;
      ProductSum<N> sum;
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int b = 0; b < n; ++b) {
          OfParts<Split<4>, N> t;
          OfParts<Split<2>, N> d_t;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const bool is_channel = v + 8 * b + 2 * pair + k < path.channels;
            d_t.set(k, is_channel ? of_channel[o * next + (8 * b + k) * width] : N{});
#pragma unroll
            for (int e = 0; e < 2; ++e) t.set(2 * k + e, of.t[o][b][2 * e + k]);
          }
          sum.add(t, d_t);
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        auto& to = neighbours<2>(d_h + (group + 8 * e) * (call.tiles.record - 4) + path.row + w + 2 * pair);
        if (of.there[e]) to = sum_of(to, {sum[2 * e], sum[2 * e + 1]});
      }
    }
  }
  template <int kOut, int n>
  __device__ __forceinline__ void factor_back(const TilePath& path, int v, const N* d_sums,
                                              const OfLane<kOut, n>& of) const {
    N sum[2] = {};
#pragma unroll
    for (int o = 0; o < kOut; ++o)
#pragma unroll
      for (int b = 0; b < n; ++b)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const N d_t = constant_grad(path, v + 8 * b, d_sums, o, k);
#pragma unroll
          for (int e = 0; e < 2; ++e) sum[e] += d_t * of.t[o][b][2 * e + k];
        }
    const N whole = sum_two(sum);
    if (pair < 2 && (pair ? of.there[1] : of.there[0])) d_factor[group + 8 * pair] += whole;
  }

  // ---- what all warps have of the chunk, by all threads

  // d_f of the input's channels: a thread has one channel of one edge.
  __device__ __forceinline__ void write_features(const TileInput& input, int n) const {
    static_assert(kTileThreads == kBackEdges * 8);
    const int mine = static_cast<int>(threadIdx.x) / 8, channel = threadIdx.x % 8;
    if (mine >= n) return;
    float* const to = wide.args.grad_edge + int64_t{edges[mine]} * wide.plan.in_size;
#pragma unroll 1
    for (int b = 0; b < input.blocks; ++b) {
      const int32_t* from = global_memory(wide.plan.gathered_from) + input.from + input.v + 8 * b + channel;
      const float* mine_of = d_f + b * call.tiles.most_in * of_block + threadIdx.x;
#pragma unroll 1
      for (int i = 0; i < input.n_in; ++i, from += input.in_stride, mine_of += of_block) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kTileWarps; ++w) sum += mine_of[w * of_warp(call.tiles)];
        const int number = *from;
        if (number >= 0) to[number] = sum;
      }
    }
  }
  __device__ __forceinline__ void clear_unread(int n) const {
    for (int k = share; k < call.tiles.n_unread && edge < n; k += shares)
      wide.args.grad_edge[int64_t{edges[edge]} * wide.plan.in_size + call.tiles.unread[k]] = 0;
  }

  __device__ __forceinline__ void write_rows(int from, int n) const {
    const int of_h = call.tiles.record - 4;
    N* const grad = call.grad_rows + (start + from) * call.tiles.record;
    for (int at = warp; at < n; at += kTileWarps)
      for (int k = lane; k < of_h; k += 32) grad[at * call.tiles.record + k] = d_h[at * of_h + k];
    auto moved = Base::backward(this->direction(from, n), d_rows);  // once more: kept, it would take registers
    moved.at[3] = d_factor[edge];
    if (share == 0 && edge < n) neighbours<4>(grad + (edge + 1) * call.tiles.record - 4) = moved;
  }
};

template <typename N>
__global__ void __launch_bounds__(kTileThreads, is_dual<N> ? 2 : 0)
    tile_backward(const __grid_constant__ TileCall<N> call) {
  SHARED_MEMORY(N, memory);
  TileBackward<N>(call, memory).run();
}

}  // namespace implicit_steer::IST_ISA
