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
  const WideCall<N>& call;
  const PlanView<R>& p;
  const int lane;
  N *const d_f, *const d_g;  // [kEdges, n_gathered], [kEdges, n_g]
  int64_t node = 0;
  int n = 0;  // edges
  int64_t edge[kEdges], neighbour[kEdges];

  // Numbers of a warp's shared memory.
  static IST_HOST_DEVICE int64_t size(const PlanView<R>& p) { return whole_quads(kEdges * (p.n_gathered + p.n_g)); }

  __device__ __forceinline__ WideBackward(const WideCall<N>& c, N* memory)
      : call(c), p(c.plan), lane(threadIdx.x % 32), d_f(memory), d_g(memory + kEdges * c.plan.n_gathered) {}

  __device__ __forceinline__ const N* record(int l) const { return call.records + edge[l] * call.lists.record; }
  __device__ __forceinline__ const N* features(int l) const { return call.x + neighbour[l] * p.n_gathered; }
  __device__ __forceinline__ const N* grad_sums(const WideSlot& slot) const {
    return call.grad_sums + call.at(slot.at, node, slot.size);
  }

  // The edges at positions number * kEdgesPerWarp .. of those into the block's nodes.
  __device__ __forceinline__ void run(int64_t number) {
    const int64_t start = call.first_edge(0), all = call.first_edge(call.n_nodes);
    const int64_t first = start + number * kEdgesPerWarp;
    const int64_t last = first + kEdgesPerWarp < all ? first + kEdgesPerWarp : all;
    for (int64_t at = first; at < last; at += n) {
      node = last_start(node, call.n_nodes, at, [&](int64_t i) { return call.first_edge(i); });
      const int64_t end = call.first_edge(node + 1) < last ? call.first_edge(node + 1) : last;
      n = end - at < kEdges ? static_cast<int>(end - at) : kEdges;
#pragma unroll
      for (int l = 0; l < kEdges; ++l) {  // beyond the last one that again, whose results are not kept
        edge[l] = call.index(call.args.order, at + (l < n ? l : n - 1));
        neighbour[l] = call.index(call.args.src, edge[l]);
      }
      of_edges();
    }
  }

  __device__ __forceinline__ void of_edges() {
    for (int k = lane; k < kEdges * (p.n_gathered + p.n_g); k += 32) d_f[k] = N{};
    __syncwarp();
    for (int k = 0; k < call.lists.n_slots; ++k) {
      const WideSlot slot = call.lists.slots[k];
      for (int term = slot.first; term < slot.last; ++term)
        if (slot.n_in > 32)
          of_products<kMostChannels>(slot, call.lists.terms[term]);
        else
          of_products<1>(slot, call.lists.terms[term]);
    }
    for (int row = 0; row < p.n_rows && call.grad_records; ++row)
      for (int w = 0; w < p.row_start[row + 1] - p.row_start[row]; w += kRow) of_row(row, w);
    __syncwarp();
    write();
  }

  // d_t[v] = Σ_w dT[v, w] h[w], then d_f[i_g, v] += d_t[v] G_g and d_G_g = Σ_v d_t[v] f[i_g, v]
  template <int K>
  __device__ __forceinline__ void of_products(const WideSlot& slot, const WideTerm& term) {
    for (int first = 0; first < slot.n_in; first += 32 * K) {
      const int v = first + lane * K;
      Neighbours<N, K> d_t[kEdges] = {};
      if (v < slot.n_in) products_of<K>(slot, term, v, d_t);
#pragma unroll 1
      for (int g = term.begin; g < term.end; ++g) {
        const int from = p.g_from[g] + v;
        N of_g[kEdges] = {};
#pragma unroll
        for (int l = 0; l < kEdges && v < slot.n_in; ++l) {
          add_multiple(neighbours<K>(d_f + l * p.n_gathered + from), record(l)[call.lists.g + g], d_t[l]);
          of_g[l] = dot(d_t[l], neighbours<K>(features(l) + from));
        }
        if (!call.grad_records) continue;
        const N sum = sum_lanes(sums_of_lanes(of_g, lane), kEdges, 32);
        if (lane < kEdges) d_g[lane * p.n_g + g] += sum;
      }
    }
  }

  template <int K>
  __device__ __forceinline__ void products_of(const WideSlot& slot, const WideTerm& term, int v,
                                              Neighbours<N, K> (&d_t)[kEdges]) const {
    const N* const d = grad_sums(slot);
    if (slot.constant) {
#pragma unroll
      for (int l = 0; l < kEdges; ++l) d_t[l] = neighbours<K>(d + v);
      return;
    }
#pragma unroll 1
    for (int w = 0; w < slot.hidden_stride; w += kRow) {
      Neighbours<N, kRow> d_sum[K];
#pragma unroll
      for (int k = 0; k < K; ++k) d_sum[k] = of_channel(slot, d, v + k, w);
#pragma unroll
      for (int l = 0; l < kEdges; ++l) {
        const auto h = neighbours<kRow>(record(l) + term.row * call.lists.stride + w);
#pragma unroll
        for (int k = 0; k < K; ++k) d_t[l].at[k] += dot(d_sum[k], h);
      }
    }
  }
  __device__ __forceinline__ Neighbours<N, kRow> of_channel(const WideSlot& slot, const N* d, int v, int w) const {
    return v < slot.n_in ? neighbours<kRow>(d + v * slot.hidden_stride + w) : Neighbours<N, kRow>{};
  }

  // d_h[row, w ..] = Σ dT[slot, v, w] t[v] over all slots that read the row
  __device__ __forceinline__ void of_row(int row, int w) {
    N sum[kEdges * kRow] = {};
    for (int k = call.lists.row_first[row]; k < call.lists.row_first[row + 1]; ++k) {
      const WideTerm term = call.lists.by_row[k];
      const WideSlot slot = call.lists.slots[term.slot];
      if (slot.n_in > 32)
        add_row<kMostChannels>(slot, term, w, sum);
      else
        add_row<1>(slot, term, w, sum);
    }
    const N total = sum_lanes(sums_of_lanes(sum, lane), kEdges * kRow, 32);
    const int l = lane / kRow;
    if (l < n && lane < kEdges * kRow) {
      const int64_t of_lane = from_array(edge, l);
      call.grad_records[of_lane * call.lists.record + row * call.lists.stride + w + lane % kRow] = total;
    }
  }

  template <int K>
  __device__ __forceinline__ void add_row(const WideSlot& slot, const WideTerm& term, int w,
                                          N (&sum)[kEdges * kRow]) const {
    for (int v = lane * K; v < slot.n_in; v += 32 * K) {
      Neighbours<N, kRow> d_sum[K];
#pragma unroll
      for (int k = 0; k < K; ++k) d_sum[k] = of_channel(slot, grad_sums(slot), v + k, w);
#pragma unroll
      for (int l = 0; l < kEdges; ++l) {
        const auto t = product<K>(p, term, record(l) + call.lists.g, features(l) + v);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int m = 0; m < kRow; ++m) sum[l * kRow + m] += t.at[k] * d_sum[k].at[m];
      }
    }
  }

  // Number l of an array in registers.
  static __device__ __forceinline__ int64_t from_array(const int64_t (&numbers)[kEdges], int l) {
    int64_t found = numbers[0];
#pragma unroll
    for (int k = 1; k < kEdges; ++k)
      if (k == l) found = numbers[k];
    return found;
  }

  __device__ __forceinline__ void write() const {
#pragma unroll
    for (int l = 0; l < kEdges; ++l) {
      if (l >= n) continue;
      for (int i = lane; i < p.in_size && call.args.grad_edge; i += 32) {
        N sum{};  // stays 0 for inputs that no coupling reads
        for (int k = call.places.first[i]; k < call.places.first[i + 1]; ++k)
          sum += d_f[l * p.n_gathered + call.places.at[k]];
        call.args.grad_edge[edge[l] * p.in_size + i] = result(sum);
      }
      for (int g = lane; g < p.n_g && call.grad_records; g += 32)
        call.grad_records[edge[l] * call.lists.record + call.lists.g + g] = d_g[l * p.n_g + g];
    }
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
