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

  __device__ __forceinline__ WideSums(const WideCall<N>& c, int64_t item)
      : call(c),
        p(c.plan),
        slot(c.lists.slots[item / c.n_nodes]),
        lane(threadIdx.x % 32),
        node(item % c.n_nodes),
        begin(c.first_edge(node)),
        end(c.first_edge(node + 1)) {}

  // f(edge, its neighbour) for the edges of this lane's part; all lanes come here.
  template <typename F>
  __device__ __forceinline__ void for_edges(int part, int parts, F f) const {
    for (int64_t at = begin; at < end; at += 32) {
      const int n = end - at < 32 ? static_cast<int>(end - at) : 32;
      const int64_t mine = lane < n ? call.index(call.args.order, at + lane) : 0;
      const int64_t source = lane < n ? call.index(call.args.src, mine) : 0;
      for (int l = part; l < n + part; l += parts) {  // as often in every lane
        const int64_t edge = from_lane(mine, l & 31), neighbour = from_lane(source, l & 31);
        if (l < n) f(edge, neighbour);
      }
    }
  }

  __device__ __forceinline__ void store(int64_t at, N sum) const {
    if constexpr (!is_dual<N>)
      call.sums[at] = sum;
    else if (call.tangents_only)
      call.sums[at] = sum.tangent;
    else
      call.sums[2 * at] = sum.tangent, call.sums[2 * at + 1] = sum.value;
  }

  __device__ __forceinline__ void run() const {
    const int rows = static_cast<int>(padded(slot.n_in)), width = row_width((rows + K - 1) / K);
    const int part = lane / width, parts = 32 / width;
    for (int first = 0; first < rows; first += width * K) {
      const int v = first + lane % width * K;
      slot.constant ? of_constant(v, v < rows, part, parts, width) : of_rows(v, v < rows, part, parts, width);
    }
  }

  // Without hidden features: T[v], 0 in its padding.
  __device__ __forceinline__ void of_constant(int v, bool active, int part, int parts, int width) const {
    Neighbours<N, K> sum{};
    for_edges(part, parts, [&](int64_t edge, int64_t neighbour) {
      if (!active) return;
      const N *const g = call.records + edge * call.lists.record + call.lists.g, *const x = call.x +
                                                                                            neighbour * p.n_gathered +
                                                                                            v;
      for (int k = slot.first; k < slot.last; ++k) sum = sum_of(sum, product<K>(p, call.lists.terms[k], g, x));
    });
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const N total = sum_lanes(sum.at[k], width, 32);
      if (active && part == 0) store(call.at(slot.at, node, slot.size) + v + k, total);
    }
  }

  __device__ __forceinline__ void of_rows(int v, bool active, int part, int parts, int width) const {
    for (int w = 0; w < slot.hidden_stride; w += kRow) {
      Neighbours<N, kRow> sum[K] = {};
      for_edges(part, parts, [&](int64_t edge, int64_t neighbour) {
        if (!active) return;
        const N *const record = call.records + edge * call.lists.record, *const x =
                                                                             call.x + neighbour * p.n_gathered + v;
#pragma unroll 1
        for (int k = slot.first; k < slot.last; ++k) {
          const WideTerm term = call.lists.terms[k];
          const auto t = product<K>(p, term, record + call.lists.g, x);
          const auto h = neighbours<kRow>(record + term.row * call.lists.stride + w);
#pragma unroll
          for (int i = 0; i < K; ++i) add_multiple(sum[i], t.at[i], h);
        }
      });
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int k = 0; k < kRow; ++k) {
          const N total = sum_lanes(sum[i].at[k], width, 32);
          const int64_t at = call.at(slot.at, node, slot.size) + (v + i) * slot.hidden_stride + w + k;
          if (part == 0 && v + i < slot.n_in) store(at, total);
        }
    }
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) wide_sums(const __grid_constant__ WideCall<N> call) {
  const int64_t item = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (item < call.lists.n_slots * call.n_nodes) WideSums<N>(call, item).run();
}

}  // namespace implicit_steer::IST_ISA
