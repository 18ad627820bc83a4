// T[slot, v, w] = Σ_e h_e[row, w] t_e[v] of layers with many fields, t_e[v] = Σ_g f_j[i_g, v] G_g of the edge's
// neighbour j: a warp for every slot of every node. A lane has neighbouring channels v and eight channels w in
// registers; lanes left over divide the edges among them.
#pragma once

#include "lanes_of_warp.cuh"
#include "neighbours.cuh"
#include "wide_call.h"

namespace implicit_steer::IST_ISA {

constexpr int kRow = 8;  // channels w at a time; rows are padded to whole multiples of it

// t[v ..] of K channels: `x` are the neighbour's features, from channel v on, `g` its factors.
template <int K, typename N, typename R>
__device__ __forceinline__ Neighbours<N, K> product(const PlanView<R>& p, const WideTerm& term, const N* g,
                                                    const N* x) {
  Neighbours<N, K> sum{};
#pragma unroll 1
  for (int i = term.begin; i < term.end; ++i) add_multiple(sum, g[i], neighbours<K>(x + p.g_from[i]));
  return sum;
}

template <typename N>
struct WideSums {
  using R = Real<N>;
  static constexpr int K = kTogether<N>;
  const WideCall<N>& call;
  const PlanView<R>& p;
  const WideSlot slot;
  const int lane;
  const int64_t node, begin, end;

  __device__ __forceinline__ WideSums(const WideCall<N>& c, unsigned item)
      : call(c),
        p(c.plan),
        slot(c.lists.slots[item / static_cast<unsigned>(c.n_nodes)]),
        lane(threadIdx.x % 32),
        node(item % static_cast<unsigned>(c.n_nodes)),
        begin(c.first_edge(node)),
        end(c.first_edge(node + 1)) {}

  __device__ __forceinline__ void run() const {
    const int rows = static_cast<int>(padded(slot.n_in)), width = row_width((rows + K - 1) / K);
    for (int first = 0; first < rows; first += width * K) {
      const int v = first + lane % width * K;
      for (int w = 0; w < slot.hidden_stride; w += kRow)
        slot.constant ? sum<1>(v, w, v < rows, width) : sum<kRow>(v, w, v < rows, width);
    }
  }

  // T[v .. v + K - 1, w .. w + kWidth - 1]; lanes of other parts have other edges. kWidth 1: without hidden features.
  template <int kWidth>
  __device__ __forceinline__ void sum(int v, int w, bool active, int width) const {
    const int part = lane / width, parts = 32 / width;
    Neighbours<N, kWidth> sums[K] = {};
    for (int64_t at = begin; at < end; at += 32) {
      const int n = end - at < 32 ? static_cast<int>(end - at) : 32;
      const int64_t mine = lane < n ? call.args.index(call.args.order, at + lane) : 0;
      const int64_t source = lane < n ? call.args.index(call.args.src, mine) : 0;
      // As often in every lane.
      for (int l = part; l < n + part; l += parts) {  // loop: edges
        const int64_t edge = from_lane(mine, l & 31), neighbour = from_lane(source, l & 31);
        if (l < n && active) add_edge(edge, neighbour, v, w, sums);
      }
    }
    const int64_t to = call.at(slot.at, node, slot.size) + v * slot.hidden_stride + w;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int m = 0; m < kWidth; ++m) sums[k].at[m] = sum_lanes(sums[k].at[m], width, 32);
      // Of a constant the padding, too.
      if (part == 0 && (kWidth == 1 ? active : v + k < slot.n_in)) store(to + k * slot.hidden_stride, sums[k]);
    }
  }

  template <int n>
  __device__ __forceinline__ void store(int64_t at, const Neighbours<N, n>& sums) const {
    if constexpr (!is_dual<N>)
      neighbours<n>(call.sums + at) = sums;
    else if (call.tangents_only)
      for (int m = 0; m < n; ++m) call.sums[at + m] = sums.at[m].tangent;
    else
      for (int m = 0; m < n; ++m)
        call.sums[2 * (at + m)] = sums.at[m].tangent, call.sums[2 * (at + m) + 1] = sums.at[m].value;
  }

  template <int kWidth>
  __device__ __forceinline__ void add_edge(int64_t edge, int64_t neighbour, int v, int w,
                                           Neighbours<N, kWidth> (&sums)[K]) const {
    const N* const record = call.records + edge * call.lists.record;
    const N* const x = call.x + neighbour * p.n_gathered + v;
#pragma unroll 1
    for (int k = slot.first; k < slot.last; ++k) {
      const WideTerm term = call.lists.terms[k];
      const auto t = product<K>(p, term, record + call.lists.g, x);
      Neighbours<N, kWidth> h{};
      if constexpr (kWidth == 1)
        h.at[0] += 1;
      else
        h = neighbours<kWidth>(record + term.row * call.lists.stride + w);
#pragma unroll
      for (int i = 0; i < K; ++i) add_multiple(sums[i], t.at[i], h);
    }
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) wide_sums(const __grid_constant__ WideCall<N> call) {
  const unsigned item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;  // a block's nodes and slots are few
  if (item < call.lists.n_slots * call.n_nodes) WideSums<N>(call, item).run();
}

}  // namespace implicit_steer::IST_ISA
