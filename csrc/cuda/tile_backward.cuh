// Backward of tile_sums.cuh, from dT in global memory: of every edge the gradients of its neighbour's features and of its
// record. A block has some nodes, 16 of their edges at a time: first all threads make G (tile_geometry.cuh), then, for
// eight channels of one type of inputs after another, every warp takes some of the paths that read them (TileInput):
//
//   d_t[o, v] = Σ_w h[w] dT[o, v, w]      A[edge, w] = h[w],      B[w, v] = dT[o, v, w]
//   d_h[w] = Σ_{o, v} t[o, v] dT[o, v, w]   A[edge, v] = t[o, v],   B[v, w] = dT[o, v, w]
//
// Lane 4 g + t has edges g and 8 + g, and of eight channels 2 t and 2 t + 1. From d_t follow d_f[i, v] = Σ_o d_t G and
// d_G[i, o] = Σ_v d_t f. Every warp has a d_f of its own, which are added up in their order; d_h and d_G of a path are
// one warp's.
#pragma once

#include "lanes_of_warp.cuh"
#include "mma.cuh"
#include "tile_geometry.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kBackEdges = 16;  // at a time

struct TileBackward {
  using Geometry = TileGeometry<kBackEdges>;
  const TileCall& call;
  const WideCall<float>& wide;
  const Geometry geometry, d;                // of the direction's part, and of its gradients
  float *const d_h, *const d_factor, *const d_f;  // [16, record - 4], [16], [warps, most_in, 16, 8]
  int32_t *const edges, *const sources;      // [16] of the chunk
  const int lane, group, pair, warp;
  const int64_t begin, last;  // the block's nodes
  int64_t node;               // into which the chunk's first edge goes
  int64_t from = 0;           // position of the chunk's first edge

  static IST_HOST_DEVICE int64_t size(const TileView& tiles) {
    return kBackEdges * (2 * tiles.of_edge() + tiles.record - 4 + 3 + kTileWarps * tiles.most_in * 8);
  }

  __device__ __forceinline__ TileBackward(const TileCall& call, float* memory)
      : call(call),
        wide(call.wide),
        geometry(call, memory),
        d(call, memory + call.tiles.of_edge() * kBackEdges),
        d_h(memory + 2 * call.tiles.of_edge() * kBackEdges),
        d_factor(d_h + (call.tiles.record - 4) * kBackEdges),
        d_f(d_factor + 3 * kBackEdges),
        edges(reinterpret_cast<int32_t*>(d_factor + kBackEdges)),
        sources(edges + kBackEdges),
        lane(threadIdx.x % 32),
        group(lane / 4),
        pair(lane % 4),
        warp(threadIdx.x / 32),
        begin(int64_t{blockIdx.x} * call.nodes_per_block),
        last(begin + call.nodes_per_block < wide.n_nodes ? begin + call.nodes_per_block : wide.n_nodes),
        node(begin) {}

  __device__ __forceinline__ void run() {
    const int64_t end = wide.first_edge(last);
    for (from = wide.first_edge(begin); from < end; from += kBackEdges) {  // loop: chunks
      const int n = end - from < kBackEdges ? static_cast<int>(end - from) : kBackEdges;
      while (wide.first_edge(node + 1) <= from) ++node;
      chunk(n);
    }
  }

  __device__ __forceinline__ void chunk(int n) {
    const auto u = geometry.direction(from, n);
    if (threadIdx.x < kBackEdges) {
      const int64_t edge = wide.args.index(wide.args.order, from + (lane < n ? lane : n - 1));
      edges[lane] = static_cast<int32_t>(edge);
      sources[lane] = static_cast<int32_t>(wide.args.index(wide.args.src, edge));
    }
    const int cleared = kBackEdges * (call.tiles.record - 4 + 1);  // d_h, d_factor
    for (int k = threadIdx.x; k < cleared && call.grad_rows; k += kTileThreads) d_h[k] = 0;
    for (int k = threadIdx.x; k < call.tiles.g.n * kBackEdges && call.grad_rows; k += kTileThreads) d.g[k] = 0;
    geometry.evaluate(u);
    for (int k = 0; k < call.tiles.n_inputs; ++k) {
      const TileInput& input = global_memory(call.tiles.inputs)[k];
      float* const mine = d_f + warp * call.tiles.most_in * kBackEdges * 8;
      for (int at = 4 * lane; at < input.n_in * kBackEdges * 8; at += 128) neighbours<4>(mine + at) = {};
      __syncwarp();
      for (int at = input.first[warp]; at < input.first[warp + 1]; ++at)
        path_back(global_memory(call.tiles.paths)[global_memory(call.tiles.input_paths)[at]], input, mine, n);
      __syncthreads();
      write_features(input, n);
      __syncthreads();
    }
    for (int k = threadIdx.x; k < n * call.tiles.n_unread && wide.args.grad_edge; k += kTileThreads)
      wide.args.grad_edge[int64_t{edges[k % n]} * wide.plan.in_size + call.tiles.unread[k / n]] = 0;
    if (call.grad_rows) write_rows(u, n);
    __syncthreads();
  }

  // ---- one path, of one node's edges in the chunk after another

  __device__ __forceinline__ void path_back(const TilePath& path, const TileInput& input, float* of_warp,
                                            int n) const {
    int64_t at = node;
    for (int64_t start = from; start < from + n; ++at) {  // loop: nodes
      const int64_t end = wide.first_edge(at + 1), stop = end < from + n ? end : from + n;
      if (stop <= start) continue;
      const Run run{static_cast<int>(start - from), static_cast<int>(stop - from), at};
      float* const of_path = of_warp + (path.from - input.from) / path.in_stride * kBackEdges * 8;
      if (path.n_out == 1)
        run_back<1>(path, input.v, run, of_path);
      else if (path.n_out == 3)
        run_back<3>(path, input.v, run, of_path);
      else
        run_back<5>(path, input.v, run, of_path);
      start = stop;
    }
  }

  // Edges begin .. stop - 1 of the chunk.
  struct Run {
    int begin, stop;
    int64_t node;
  };
  // Of this lane: edges group and 8 + group, channels 2 pair and 2 pair + 1; number 2 e + k of four is of edge e and
  // channel k.
  template <int kOut>
  struct OfLane {
    float d_t[kOut][4] = {}, t[kOut][4] = {};
    int place[2];  // in the chunk; that of another one in place of an edge outside of the run
    bool there[2];
  };

  template <int kOut>
  __device__ __forceinline__ void run_back(const TilePath& path, int v, const Run& run, float* of_path) const {
    OfLane<kOut> of;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = group + 8 * e;
      of.there[e] = at >= run.begin && at < run.stop;
      of.place[e] = of.there[e] ? at : run.begin;
    }
    const float* const d_sums = wide.grad_sums + wide.at(path.at, run.node, path.size);
    path.row < 0 ? constant_back(path, v, d_sums, of) : products_back(path, v, d_sums, of);
    inputs_back(path, v, of, of_path);
    if (call.grad_rows) path.row < 0 ? factor_back(path, v, d_sums, of) : rows_back(path, v, d_sums, of);
  }
  // dT of the path's next component
  __device__ __forceinline__ int64_t step(const TilePath& path) const { return path.size * wide.n_nodes; }

  template <int kOut>
  __device__ __forceinline__ void products_back(const TilePath& path, int v, const float* d_sums,
                                                OfLane<kOut>& of) const {
    Split<4> h;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto two = neighbours<2>(call.rows + (from + of.place[e]) * call.tiles.record + path.row + 2 * pair);
#pragma unroll
      for (int k = 0; k < 2; ++k) h.set(2 * k + e, of.there[e] ? two.at[k] : 0);
    }
    const bool is_channel = v + group < path.channels;
    const float* const of_channel = d_sums + (v + group) * TilePlan::kWidth + 2 * pair;
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      Neighbours<float, 2> two{};
      if (is_channel) two = neighbours<2>(of_channel + o * step(path));
      Split<2> d_t;
      d_t.set(0, two.at[0]), d_t.set(1, two.at[1]);
      mma_3xtf32(of.d_t[o], h, d_t);
    }
  }
  template <int kOut>
  __device__ __forceinline__ void constant_back(const TilePath& path, int v, const float* d_sums,
                                                OfLane<kOut>& of) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float factor = call.rows[(from + of.place[e] + 1) * call.tiles.record - 1];
#pragma unroll
      for (int o = 0; o < kOut; ++o)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (of.there[e]) of.d_t[o][2 * e + k] = factor * constant_grad(path, v, d_sums, o, k);
    }
  }
  __device__ __forceinline__ float constant_grad(const TilePath& path, int v, const float* d_sums, int o,
                                                 int k) const {
    const int channel = v + 2 * pair + k;
    return channel < path.channels ? d_sums[o * step(path) + channel] : 0;
  }

  // t, d_f and d_G
  template <int kOut>
  __device__ __forceinline__ void inputs_back(const TilePath& path, int v, OfLane<kOut>& of, float* of_path) const {
    const float* x[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      x[e] = wide.x + int64_t{sources[of.place[e]]} * wide.plan.n_gathered + path.from + v + 2 * pair;
    int at = path.g * kBackEdges + group;
    float* to = of_path + group * 8 + 2 * pair;
#pragma unroll 1
    for (int i = 0; i < path.n_in; ++i, at += kOut * kBackEdges, to += kBackEdges * 8) {
      Neighbours<float, 2> f[2], d_f_i[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) f[e] = neighbours<2>(x[e] + i * path.in_stride);
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        float of_g[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float g = geometry.g[at + o * kBackEdges + 8 * e];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            of.t[o][2 * e + k] += f[e].at[k] * g;
            d_f_i[e].at[k] += of.d_t[o][2 * e + k] * g;
          }
          of_g[e] = of.d_t[o][2 * e] * f[e].at[0] + of.d_t[o][2 * e + 1] * f[e].at[1];
        }
        if (call.grad_rows && path.row >= 0) add_to_g(at - group + o * kBackEdges, of_g, of);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        auto& sum = neighbours<2>(to + 8 * 8 * e);
        if (of.there[e]) sum = sum_of(sum, d_f_i[e]);
      }
    }
  }

  // Sums of two numbers over the lanes of an edge: the first of even lanes, the second of odd ones.
  __device__ __forceinline__ float sum_two(const float (&x)[2]) const {
    const bool odd = pair & 1;
    const float sum = (odd ? x[1] : x[0]) + from_lane_xor(odd ? x[0] : x[1], 1);
    return sum + from_lane_xor(sum, 2);
  }
  template <int kOut>
  __device__ __forceinline__ void add_to_g(int at, const float (&of_g)[2], const OfLane<kOut>& of) const {
    const float sum = sum_two(of_g);
    if (pair < 2 && (pair ? of.there[1] : of.there[0])) d.g[at + group + 8 * pair] += sum;
  }

  template <int kOut>
  __device__ __forceinline__ void rows_back(const TilePath& path, int v, const float* d_sums,
                                            const OfLane<kOut>& of) const {
    float sum[4] = {};
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
      Split<4> t;
      Split<2> d_t;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int channel = v + 2 * pair + k;
        d_t.set(k, channel < path.channels ? d_sums[o * step(path) + channel * TilePlan::kWidth + group] : 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) t.set(2 * k + e, of.t[o][2 * e + k]);
      }
      mma_3xtf32(sum, t, d_t);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      auto& to = neighbours<2>(d_h + (group + 8 * e) * (call.tiles.record - 4) + path.row + 2 * pair);
      if (of.there[e]) to = sum_of(to, {sum[2 * e], sum[2 * e + 1]});
    }
  }
  template <int kOut>
  __device__ __forceinline__ void factor_back(const TilePath& path, int v, const float* d_sums,
                                              const OfLane<kOut>& of) const {
    float sum[2] = {};
#pragma unroll
    for (int o = 0; o < kOut; ++o)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float d_t = constant_grad(path, v, d_sums, o, k);
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[e] += d_t * of.t[o][2 * e + k];
      }
    const float whole = sum_two(sum);
    if (pair < 2 && (pair ? of.there[1] : of.there[0])) d_factor[group + 8 * pair] += whole;
  }

  // ---- what all warps have of the chunk, by all threads

  // d_f of the input's channels, edge by edge
  __device__ __forceinline__ void write_features(const TileInput& input, int n) const {
    const int32_t* const gathered_from = global_memory(wide.plan.gathered_from);
    for (int k = threadIdx.x; k < n * input.n_in * 8 && wide.args.grad_edge; k += kTileThreads) {
      const int edge = k / 8 % n, i = k / 8 / n;
      const int to = gathered_from[input.from + i * input.in_stride + input.v + k % 8];
      float sum = 0;
      for (int w = 0; w < kTileWarps; ++w)
        sum += d_f[((w * call.tiles.most_in + i) * kBackEdges + edge) * 8 + k % 8];
      if (to >= 0) wide.args.grad_edge[int64_t{edges[edge]} * wide.plan.in_size + to] = sum;
    }
  }

  __device__ __forceinline__ void write_rows(const Neighbours<float, 4>& u, int n) const {
    float* const rows = call.grad_rows + from * call.tiles.record;
    const int of_h = call.tiles.record - 4;
    for (int k = threadIdx.x; k < n * of_h; k += kTileThreads) rows[k / of_h * call.tiles.record + k % of_h] = d_h[k];
    auto moved = geometry.backward(u, d);
    moved.at[3] = d_factor[geometry.edge];
    if (static_cast<int>(threadIdx.x) < n) neighbours<4>(rows + (threadIdx.x + 1) * call.tiles.record - 4) = moved;
  }
};

__global__ void __launch_bounds__(kTileThreads) tile_backward(const __grid_constant__ TileCall call) {
  SHARED_MEMORY(float, memory);
  TileBackward(call, memory).run();
}

}  // namespace implicit_steer::IST_ISA
