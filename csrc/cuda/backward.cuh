// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep, per node dθ += g ⊗ T.
#pragma once

#include "reverse.cuh"

namespace implicit_steer::IST_ISA {

template <typename N>
struct Backward : Reverse<N, true> {
  using R = Real<N>;
  using Base = Reverse<N, true>;
  using Base::a, Base::p, Base::terms, Base::weights, Base::e, Base::features, Base::f, Base::g, Base::t, Base::d_f;
  using Base::d_g, Base::d_t, Base::d_hidden, Base::lane, Base::lanes, Base::sub, Base::active, Base::edge;
  using Base::need_geometry, Base::need_weights, Base::grad_weights;
  const int64_t n_sums;
  const Places& places;
  const bool need_hidden, mean;
  N *sums, *d_sums, *mixed;  // T, ∂L/∂T, the output's gradient by field type

  __device__ __forceinline__ explicit Backward(const Call<R>& call)
      : Base(call),
        n_sums(call.extent.sums),
        places(call.places),
        need_hidden(need_geometry || need_weights),
        mean(call.mean) {
    d_sums = this->rest, mixed = d_sums + n_sums, sums = mixed + p.n_mixed;
  }

  // ---- a node

  // Behind it run() has a barrier before it reads d_sums.
  __device__ __forceinline__ void start(int64_t node) {
    R edges = 1;
    if (mean) edges = static_cast<R>(this->index(a.rowptr, node + 1) - this->index(a.rowptr, node));
    for (int k = lane; k < p.out_size; k += 32)
      if (p.mixed_place[k] >= 0)
        mixed[p.mixed_place[k]] = constant_number<N>(a.grad_out[node * p.out_size + k] / edges);
    if (need_weights) this->clear(sums, n_sums);
    __syncwarp();
    for (int k = 0; k < p.n_couplings; ++k) {  // loop: gradient of T
      const CouplingView q = this->coupling_view(k);
      for (int slot = 0; slot < q.n_slots; ++slot) {
        const N* const weight = weights + q.theta + int64_t{q.slots[2 * slot]} * q.theta_rows * q.theta_size;
        const N* const grad = mixed + q.out_at + q.slots[2 * slot + 1] * q.out_stride;
        for (int64_t x = lane; x < q.theta_size; x += 32) {
          N sum{};
          if (q.depthwise) {
            if (x < channels_end(q)) sum = weight[x] * grad[x / q.hidden_stride];
          } else {
#pragma unroll 2
            for (int u = 0; u < q.n_out; ++u) sum += weight[u * q.theta_size + x] * grad[u];
          }
          d_sums[q.at_sums + slot * q.theta_size + x] = sum;
        }
      }
    }
  }

  // Where the numbers [v, w] of θ or T end, before their padding.
  static __device__ __forceinline__ int64_t channels_end(const CouplingView& q) {
    return int64_t{q.n_in} * q.hidden_stride;
  }

  // dθ[b][u][v, w] += Σ_o g[u, o] T[b, o][v, w], of a depthwise coupling only u = v; the slots of one b follow each
  // other
  __device__ __forceinline__ void finish(int64_t) {
    if (!need_weights) return;
    for (int k = 0; k < p.n_couplings; ++k) {  // loop: gradient of theta
      const CouplingView q = this->coupling_view(k);
      for (int slot = 0, end; slot < q.n_slots; slot = end) {
        const int b = q.slots[2 * slot];
        for (end = slot + 1; end < q.n_slots && q.slots[2 * end] == b; ++end) {
        }
        R* const out = grad_weights + q.theta + int64_t{b} * q.theta_rows * q.theta_size;
        if (q.depthwise) {
          add_channels(q, slot, end, out);
          continue;
        }
        for (int u = 0; u < q.n_out; ++u)
          for (int64_t x = lane; x < q.theta_size; x += 32) {
            N sum{};
#pragma unroll 1
            for (int s = slot; s < end; ++s)
              sum += sums[q.at_sums + s * q.theta_size + x] * mixed[q.out_at + q.slots[2 * s + 1] * q.out_stride + u];
            out[u * q.theta_size + x] += result(sum);
          }
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_channels(const CouplingView& q, int slot, int end, R* out) {
    for (int64_t x = lane; x < channels_end(q); x += 32) {
      const int64_t v = x / q.hidden_stride;
      N sum{};
      for (int s = slot; s < end; ++s)
        sum += sums[q.at_sums + s * q.theta_size + x] * mixed[q.out_at + q.slots[2 * s + 1] * q.out_stride + v];
      out[x] += result(sum);
    }
  }

  // ---- the edges of a tile that go into one node

  __device__ __forceinline__ void run(int l0, int l1) {
    if (need_weights) this->accumulate(sums, l0, l1);
    this->for_blocks([&](const CouplingView& q, int first_slot, int n_slots, const int32_t* row, int at) {
      const N* const of_slots = d_sums + q.at_sums + first_slot * q.theta_size;
      __syncwarp();  // T is complete here, as finish() wants it; and rows can share hidden features
      for (int s = 0; s < n_slots; ++s) of_products(q, of_slots + s * q.theta_size, row, at + s * q.in_stride, l0, l1);
      if (need_hidden && !q.constant) of_row(q, of_slots, n_slots, row, at, l0, l1);
    });
  }

  // d_t[v] = Σ_w dT[v, w] h[w], 0 in a row's padding
  __device__ __forceinline__ void of_products(const CouplingView& q, const N* of_slot, const int32_t* row, int at,
                                              int l0, int l1) {
    const int width = row_width(q.in_stride), step = 32 / width;
    for (int l = l0 + lane / width; l < l1; l += step) {
      const N* const h = this->of_edge(features, l);
      for (int v = lane & (width - 1); v < q.in_stride; v += width) {
        N sum{};
        if (q.constant && v < q.n_in) sum = of_slot[v];
#pragma unroll 2
        for (int w = 0; w < q.n_hidden && v < q.n_in && !q.constant; ++w)
          sum += of_slot[v * q.hidden_stride + w] * h[row[w]];
        this->of_edge(d_t, l)[at + v] = sum;
      }
    }
  }

  // d_h[w] += Σ dT[slot, v, w] t[slot, v] over the slots and v
  __device__ __forceinline__ void of_row(const CouplingView& q, const N* of_slots, int n_slots, const int32_t* row,
                                         int at, int l0, int l1) {
    const int width = row_width(q.n_hidden), step = 32 / width;
    for (int l = l0 + lane / width; l < l1; l += step) {
      for (int w = lane & (width - 1); w < q.n_hidden; w += width) {
        N sum{};
        for (int s = 0; s < n_slots; ++s) {
          const N *const of_slot = of_slots + s * q.theta_size + w,
                         *product = this->of_edge(t + at, l) + s * q.in_stride;
#pragma unroll 2
          for (int v = 0; v < q.n_in; ++v) sum += of_slot[v * q.hidden_stride] * product[v];
        }
        this->of_edge(d_hidden, l)[row[w]] += sum;
      }
    }
  }

  // ---- a tile

  __device__ __forceinline__ void begin_tile() {
    for (int k = sub; k < p.hidden_flat && active; k += lanes) d_hidden[k] = N{};
  }

  // d_f[i, v] = Σ d_t[v] G_i, d_G_i = Σ_v d_t[v] f[i, v]; G with the radial factor
  __device__ __forceinline__ void products_backward() {
    for (int n = sub / 2; n < p.n_adjoint && a.grad_edge; n += lanes / 2) {
      const int32_t* row = p.adjoint + 4 * n;
      const int at = row[0], size = row[1], begin = row[2], end = row[3];
      for (int v = sub % 2 * kTogether<N>; v < size; v += 2 * kTogether<N>) {
        Neighbours<N, kTogether<N>> sum{};
#pragma unroll 1
        for (int i = begin; i < end; ++i)
          add_multiple(sum, g[p.adjoint_g[i]], neighbours<kTogether<N>>(d_t + p.adjoint_from[i] + v));
        neighbours<kTogether<N>>(d_f + at + v) = sum;
      }
    }
    for (int n = sub; n < p.n_products && need_hidden; n += lanes) {
      const int32_t* product = p.products + 4 * n;
      const int at = product[0], size = product[1], begin = product[2], end = product[3];
      for (int i = begin; i < end; ++i) {
        const N *const d = d_t + at, *const in = f + p.g_from[i];
        N sum{};
#pragma unroll 1
        for (int v = 0; v < size; v += kTogether<N>)
          sum += dot(neighbours<kTogether<N>>(d + v), neighbours<kTogether<N>>(in + v));
        d_g[i] = sum;
      }
    }
  }

  __device__ __forceinline__ void store_features() {
    IST_ROLLED for (int i = sub; i < p.in_size && active; i += lanes) {
      N sum{};  // stays 0 for inputs that no coupling reads
      IST_ROLLED for (int k = places.first[i]; k < places.first[i + 1]; ++k) sum += d_f[places.at[k]];
      a.grad_edge[edge * p.in_size + i] = result(sum);
    }
  }

  __device__ __forceinline__ void end_tile() {
    __syncwarp();
    if (active) products_backward();
    __syncwarp();
    if (a.grad_edge) store_features();
    if (!need_hidden) return;
    e.d_radius = N{};
    this->factors_backward(d_g);
    this->sweep();
  }
};

template <typename N>
__global__ void __launch_bounds__(kThreads, kResident<N>) conv_backward(const __grid_constant__ Call<Real<N>> call) {
  Backward<N> warp(call);
  if (warp.number >= call.shape.warps) return;
  warp.clear_gradients();
  warp.walk(warp);
  warp.write_shell();
}

}  // namespace implicit_steer::IST_ISA
