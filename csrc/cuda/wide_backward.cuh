// Backward of layers with many fields, from dT in global memory: of every edge the gradient of its neighbour's features
// and of its record, h and G. A warp has a few edges of one node at a time. Lanes have channels v.
#pragma once

#include "wide_sums.cuh"

namespace implicit_steer::IST_ISA {

constexpr int kEdgesPerWarp = 32;  // of a launch

// Sums over the warp's lanes of n numbers of each, n a power of two: of number k in the lanes l with l % n == k, over
// those that l % n differs among.
template <int n, typename N>
__device__ __forceinline__ N sums_of_lanes(const N (&x)[n], int lane) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    constexpr int half = n / 2;
    const bool upper = lane & half;
    N sums[half];
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const N kept = upper ? x[k + half] : x[k], given = upper ? x[k] : x[k + half];
      sums[k] = kept + from_lane_xor(given, half);
    }
    return sums_of_lanes(sums, lane);
  }
}

template <typename N>
struct WideBackward {
  using R = Real<N>;
  static constexpr int kEdges = sizeof(N) == 4 ? 4 : 2;         // at a time
  static constexpr int kMostChannels = sizeof(N) == 4 ? 2 : 1;  // of a lane
  using Row = Neighbours<N, kRow>;
  const WideCall<N>& call;
  const PlanView<R>& p;
  const int lane;
  N *const d_f, *const d_g;  // [kEdges, n_gathered], [kEdges, n_g]
  int node = 0;              // of the block
  int n = 0;                 // edges
  // Of lane l the number of edge l; of lanes beyond the last one that of the last one, whose results count once.
  int64_t mine = 0;
  const N *record[kEdges], *features[kEdges];  // of each, and of its neighbour

  // Numbers of a warp's shared memory.
  static IST_HOST_DEVICE int64_t size(const PlanView<R>& p) { return whole_quads(kEdges * (p.n_gathered + p.n_g)); }

  __device__ __forceinline__ WideBackward(const WideCall<N>& c, N* memory)
      : call(c), p(c.plan), lane(threadIdx.x % 32), d_f(memory), d_g(memory + kEdges * c.plan.n_gathered) {}

  // The edges at positions number * kEdgesPerWarp .. of those into the block's nodes.
  __device__ __forceinline__ void run(int64_t number) {
    const int64_t start = call.first_edge(0), all = call.first_edge(call.n_nodes);
    const int64_t first = start + number * kEdgesPerWarp;
    const int64_t last = first + kEdgesPerWarp < all ? first + kEdgesPerWarp : all;
    for (int64_t at = first; at < last; at += n) {  // loop: edges
      node = static_cast<int>(last_start(node, call.n_nodes, at, [&](int64_t i) { return call.first_edge(i); }));
      const int64_t end = call.first_edge(node + 1) < last ? call.first_edge(node + 1) : last;
      n = end - at < kEdges ? static_cast<int>(end - at) : kEdges;
      mine = call.args.index(call.args.order, at + (lane < n ? lane : n - 1));
      const int64_t source = call.args.index(call.args.src, mine);
#pragma unroll
      for (int l = 0; l < kEdges; ++l) {
        record[l] = call.records + from_lane(mine, l) * call.lists.record;
        features[l] = call.x + from_lane(source, l) * p.n_gathered;
      }
      of_edges();
    }
  }

  __device__ __forceinline__ void of_edges() {
    for (int k = lane; k < kEdges * (p.n_gathered + p.n_g); k += 32) d_f[k] = N{};
    __syncwarp();
    for (int row = 0; row < p.n_rows; ++row)
      for (int w = 0; w < p.row_start[row + 1] - p.row_start[row]; w += kRow) of_row(row, w);
    of_row(p.n_rows, 0);
    __syncwarp();
    write();
  }

  // d_h[row, w ..] = Σ dT[slot, v, w] t[v] over the terms that read the row; with w = 0 also what else they give.
  __device__ __forceinline__ void of_row(int row, int w) {
    const bool constant = row == p.n_rows;
    N sum[kEdges * kRow] = {};
    for (int k = call.lists.row_first[row]; k < call.lists.row_first[row + 1]; ++k) {
      const WideTerm& term = call.lists.by_row[k];
      const WideSlot& slot = call.lists.slots[term.slot];
      const int step = slot.n_in > 32 ? 32 * kMostChannels : 32;
#pragma unroll 1
      for (int first = 0; first < slot.n_in; first += step)  // loop: terms
        slot.n_in > 32 ? of_term<kMostChannels>(slot, term, first + lane * kMostChannels, w, sum)
                       : of_term<1>(slot, term, lane, w, sum);
    }
    if (constant || !call.grad_records) return;
    const N total = sum_lanes(sums_of_lanes(sum, lane), kEdges * kRow, 32);
    const int64_t edge = from_lane(mine, lane / kRow);
    if (lane < n * kRow)
      call.grad_records[edge * call.lists.record + row * call.lists.stride + w + lane % kRow] = total;
  }

  // A lane has channels v .. of the term, or none.
  template <int K>
  __device__ __forceinline__ void of_term(const WideSlot& slot, const WideTerm& term, int v, int w,
                                          N (&sum)[kEdges * kRow]) {
    const bool there = v < slot.n_in;
    const N* const d = call.grad_sums + call.at(slot.at, node, slot.size);
    Row d_sum[K] = {};
    Neighbours<N, K> d_t[kEdges] = {}, t[kEdges] = {};
    if (there && slot.constant) {
#pragma unroll
      for (int l = 0; l < kEdges; ++l) d_t[l] = neighbours<K>(d + v);
    } else if (there) {
      load(slot, d, v, w, d_sum);
      if (w == 0) products_backward(slot, term, d, v, d_sum, d_t);
    }
    if (w == 0)
      features_backward(term, v, there, d_t, t);
    else if (there)
      products(term, v, t);
    if (slot.constant) return;
#pragma unroll
    for (int l = 0; l < kEdges; ++l)
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int m = 0; m < kRow; ++m) sum[l * kRow + m] += t[l].at[k] * d_sum[k].at[m];
  }

  // dT[v .., w ..], 0 for channels that there are not
  template <int K>
  __device__ __forceinline__ void load(const WideSlot& slot, const N* d, int v, int w, Row (&d_sum)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (v + k < slot.n_in) d_sum[k] = neighbours<kRow>(d + (v + k) * slot.hidden_stride + w);
  }

  // d_t[v] = Σ_w dT[v, w] h[w]; `first`: dT of the first w
  template <int K>
  __device__ __forceinline__ void products_backward(const WideSlot& slot, const WideTerm& term, const N* d, int v,
                                                    const Row (&first)[K], Neighbours<N, K> (&d_t)[kEdges]) const {
    const int row = term.row * call.lists.stride;
    add_products(row, first, d_t);
#pragma unroll 1
    for (int w = kRow; w < slot.hidden_stride; w += kRow) {
      Row d_sum[K] = {};
      load(slot, d, v, w, d_sum);
      add_products(row + w, d_sum, d_t);
    }
  }
  template <int K>
  __device__ __forceinline__ void add_products(int at, const Row (&d_sum)[K], Neighbours<N, K> (&d_t)[kEdges]) const {
#pragma unroll
    for (int l = 0; l < kEdges; ++l) {
      const auto h = neighbours<kRow>(record[l] + at);
#pragma unroll
      for (int k = 0; k < K; ++k) d_t[l].at[k] += dot(d_sum[k], h);
    }
  }

  // t[v] = Σ_g f[i_g, v] G_g
  template <int K>
  __device__ __forceinline__ void products(const WideTerm& term, int v, Neighbours<N, K> (&t)[kEdges]) const {
#pragma unroll
    for (int l = 0; l < kEdges; ++l) t[l] = product<K>(p, term, record[l] + call.lists.g, features[l] + v);
  }

  // As products(), and d_f[i_g, v] += d_t[v] G_g and d_G_g = Σ_v d_t[v] f[i_g, v]
  template <int K>
  __device__ __forceinline__ void features_backward(const WideTerm& term, int v, bool there,
                                                    const Neighbours<N, K> (&d_t)[kEdges],
                                                    Neighbours<N, K> (&t)[kEdges]) {
#pragma unroll 1
    for (int g = term.begin; g < term.end; ++g) {
      const int from = p.g_from[g] + v;
      N of_g[kEdges] = {};
#pragma unroll
      for (int l = 0; l < kEdges; ++l) {
        if (!there) continue;
        const N factor = record[l][call.lists.g + g];
        const auto f = neighbours<K>(features[l] + from);
        add_multiple(t[l], factor, f), add_multiple(neighbours<K>(d_f + l * p.n_gathered + from), factor, d_t[l]);
        of_g[l] = dot(d_t[l], f);
      }
      if (!call.grad_records) continue;
      const N sum = sum_lanes(sums_of_lanes(of_g, lane), kEdges, 32);
      if (lane < kEdges) d_g[lane * p.n_g + g] += sum;
    }
  }

  __device__ __forceinline__ void write() const {
    int64_t edge[kEdges];
#pragma unroll
    for (int l = 0; l < kEdges; ++l) edge[l] = from_lane(mine, l);
    for (int i = lane; i < p.in_size && call.args.grad_edge; i += 32) {  // loop: features
      // Stays 0 for inputs that no coupling reads.
      N sum[kEdges] = {};
#pragma unroll 1
      for (int k = call.places.first[i]; k < call.places.first[i + 1]; ++k)
#pragma unroll
        for (int l = 0; l < kEdges; ++l) sum[l] += d_f[l * p.n_gathered + call.places.at[k]];
#pragma unroll
      for (int l = 0; l < kEdges; ++l)
        if (l < n) call.args.grad_edge[edge[l] * p.in_size + i] = result(sum[l]);
    }
    for (int g = lane; g < p.n_g && call.grad_records; g += 32)
#pragma unroll
      for (int l = 0; l < kEdges; ++l)
        if (l < n) call.grad_records[edge[l] * call.lists.record + call.lists.g + g] = d_g[l * p.n_g + g];
    __syncwarp();
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) wide_backward(const __grid_constant__ WideCall<N> call) {
  SHARED_MEMORY(N, memory);
  const int64_t number = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  WideBackward<N> warp(call, memory + threadIdx.x / 32 * WideBackward<N>::size(call.plan));
  warp.run(number);
}

}  // namespace implicit_steer::IST_ISA
