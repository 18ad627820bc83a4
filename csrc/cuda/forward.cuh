// Forward: out_i = Σ_b θ_b T_i[b]. A node whose edges several warps share gets a row of outputs from each of them.
#pragma once

#include "warp.cuh"

namespace implicit_steer::IST_ISA {

template <typename N>
struct Forward : Warp<N, true, false> {
  using R = Real<N>;
  using Base = Warp<N, true, false>;
  using Base::a, Base::p, Base::weights, Base::lane, Base::first, Base::last, Base::number;
  R* const partial;
  const int64_t n_sums;
  N *sums, *mixed;  // T, [n_mixed]

  __device__ __forceinline__ explicit Forward(const Call<R>& call)
      : Base(call), partial(call.partial), n_sums(call.extent.sums) {
    sums = this->rest, mixed = sums + n_sums;
  }

  __device__ __forceinline__ void start(int64_t) {
    this->clear(sums, n_sums);
    __syncwarp();
  }
  __device__ __forceinline__ void run(int l0, int l1) { this->accumulate(sums, l0, l1); }
  __device__ __forceinline__ void begin_tile() {}
  __device__ __forceinline__ void end_tile() {}

  __device__ __forceinline__ void finish(int64_t node) {
    this->clear(mixed, p.n_mixed);
    __syncwarp();
    for (int k = 0; k < p.n_couplings; ++k) {  // loop: mixing
      const CouplingView q = this->coupling_view(k);
      for (int slot = 0; slot < q.n_slots; ++slot) q.depthwise ? mix_channels(q, slot) : mix(q, slot);
    }
    __syncwarp();
    R* const out = row_of(node);
    for (int k = lane; k < p.out_size; k += 32) out[k] = p.mixed_place[k] < 0 ? R{} : result(mixed[p.mixed_place[k]]);
  }

  // The node's row of the output, or of the warp's partial ones: the first where the node began in an earlier warp.
  __device__ __forceinline__ R* row_of(int64_t node) const {
    const int64_t begin = this->index(a.rowptr, node), end = this->index(a.rowptr, node + 1);
    if (first <= begin && end <= last) return a.out + node * p.out_size;
    return partial + (2 * number + (begin <= first ? 0 : 1)) * p.out_size;
  }

  // mixed[o, u] += Σ_w θ[b, w, u] T[slot, u, w] of a depthwise coupling
  __device__ __forceinline__ void mix_channels(const CouplingView& q, int slot) {
    const N* const weight = weights + q.theta_forward + int64_t{q.slots[2 * slot]} * q.n_hidden * q.out_stride;
    const N* const of_slot = sums + q.at_sums + slot * q.theta_size;
    N* const out = mixed + q.out_at + q.slots[2 * slot + 1] * q.out_stride;
    for (int u = lane; u < q.n_out; u += 32) {
      N sum = out[u];
      for (int w = 0; w < q.n_hidden; ++w) sum += weight[w * q.out_stride + u] * of_slot[u * q.hidden_stride + w];
      out[u] = sum;
    }
  }

  // mixed[o, u] += Σ_{v, w} θ[b, v, w, u] T[slot, v, w]: a lane for each u, and the sum divided among those left over
  __device__ __forceinline__ void mix(const CouplingView& q, int slot) {
    const int width = row_width(q.n_out), parts = 32 / width, part = lane / width;
    const N* const of_basis = weights + q.theta_forward + q.slots[2 * slot] * q.forward_size();
    const N* const of_slot = sums + q.at_sums + slot * q.theta_size;
    N* const out = mixed + q.out_at + q.slots[2 * slot + 1] * q.out_stride;
    for (int u0 = 0; u0 < q.n_out; u0 += width) {
      const int u = u0 + (lane & (width - 1));
      const int n = u < q.n_out ? q.n_in * q.n_hidden : 0;
      const N* const weight = of_basis + q.forward_place(u);
      const int stride = q.panel_width(u);
      N sum{};
      for (int x = part, v = 0, w = part; x < n; x += parts, w += parts) {
        for (; w >= q.n_hidden; w -= q.n_hidden) ++v;
        sum += weight[x * stride] * of_slot[v * q.hidden_stride + w];
      }
      sum = sum_lanes(sum, width, 32);
      if (part == 0 && u < q.n_out) out[u] += sum;
    }
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) conv_forward(const __grid_constant__ Call<Real<N>> call) {
  Forward<N> warp(call);
  if (warp.number < call.shape.warps) warp.walk(warp);
}

// What follows the sums, one thread for each number of the output: of nodes that no warp had to itself, those without
// edges and those whose edges several warps share, the sum of the warps' rows in their order; then mean and bias.
template <typename R>
__global__ void __launch_bounds__(kThreads)
    mean_and_bias(const __grid_constant__ Call<R> call, const __grid_constant__ MeanAndBias<R> after) {
  const ConvArgs<R>& a = call.args;
  const int64_t n = call.plan.out_size, at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= a.n_dst * n) return;
  const int64_t node = at / n, k = at % n, per_warp = call.shape.edges_per_warp;
  const auto start = [&](int64_t i) {
    return a.index64 ? static_cast<const int64_t*>(a.rowptr)[i] : static_cast<const int32_t*>(a.rowptr)[i];
  };
  const int64_t begin = start(node), end = start(node + 1), from = begin / per_warp, to = (end - 1) / per_warp;
  const bool whole = begin < end && from == to;
  if (whole && !after.mean && !after.n) return;
  R sum = whole ? a.out[at] : R{};
  for (int64_t warp = from; warp <= to && begin < end && !whole; ++warp)
    sum += call.partial[(2 * warp + (begin <= warp * per_warp ? 0 : 1)) * n + k];
  if (after.mean && end - begin > 1) sum /= static_cast<R>(end - begin);
  a.out[at] = after.with_bias(sum, k);
}

}  // namespace implicit_steer::IST_ISA
