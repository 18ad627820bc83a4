// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep, per node dθ += g ⊗ T.
#pragma once

#include "reverse.cuh"

namespace implicit_steer::IST_ISA {

template <typename N>
struct Backward : Reverse<N, true> {
  using R = Real<N>;
  using Base = Reverse<N, true>;
  using Base::a, Base::p, Base::weights, Base::e, Base::features, Base::f, Base::g, Base::t, Base::d_f, Base::d_g;
  using Base::d_t, Base::d_hidden, Base::lane, Base::lanes, Base::sub, Base::active, Base::edge;
  using Base::need_geometry, Base::need_weights, Base::grad_weights;
  const int64_t n_sums;
  const Places& places;
  const bool need_hidden;
  N *sums, *d_sums, *mixed;  // T, ∂L/∂T, the output's gradient by field type

  __device__ __forceinline__ explicit Backward(const Call<R>& call)
      : Base(call), n_sums(call.extent.sums), places(call.places), need_hidden(need_geometry || need_weights) {
    d_sums = this->rest, mixed = d_sums + n_sums, sums = mixed + p.n_mixed;
  }

  // ---- a node

  // Behind it run() has a barrier before it reads d_sums.
  __device__ __forceinline__ void start(int64_t node) {
    for (int k = lane; k < p.out_size; k += 32)
      if (p.place[k] >= 0) mixed[p.place[k]] = constant_number<N>(a.grad_out[node * p.out_size + k]);
    if (need_weights) this->clear(sums, n_sums);
    __syncwarp();
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView q = this->coupling_view(k);
      for (int slot = 0; slot < q.n_slots; ++slot) {
        const N* const weight = weights + q.theta + int64_t{q.slots[2 * slot]} * q.n_out * q.theta_size;
        const N* const grad = mixed + q.out_at + q.slots[2 * slot + 1] * q.out_padded;
        for (int64_t x = lane; x < q.theta_size; x += 32) {
          N sum{};
          for (int u = 0; u < q.n_out; ++u) sum += weight[u * q.theta_size + x] * grad[u];
          d_sums[q.at_sums + slot * q.theta_size + x] = sum;
        }
      }
    }
  }

  // dθ[b][u][v, w] += Σ_o g[u, o] T[b, o][v, w]; the slots of one b follow each other
  __device__ __forceinline__ void finish(int64_t) {
    if (!need_weights) return;
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView q = this->coupling_view(k);
      for (int slot = 0, end; slot < q.n_slots; slot = end) {
        const int b = q.slots[2 * slot];
        for (end = slot + 1; end < q.n_slots && q.slots[2 * end] == b; ++end) {
        }
        R* const out = grad_weights + q.theta + int64_t{b} * q.n_out * q.theta_size;
        for (int u = 0; u < q.n_out; ++u)
          for (int64_t x = lane; x < q.theta_size; x += 32) {
            N sum{};
            for (int s = slot; s < end; ++s)
              sum += sums[q.at_sums + s * q.theta_size + x] * mixed[q.out_at + q.slots[2 * s + 1] * q.out_padded + u];
            out[u * q.theta_size + x] += result(sum);
          }
      }
    }
    __syncwarp();
  }

  // ---- the edges of a tile that go into one node

  __device__ __forceinline__ void run(int l0, int l1) {
    if (need_weights) this->accumulate(sums, l0, l1);
    this->for_blocks([&](const CouplingView& q, int first_slot, int n_slots, const int32_t* row, int at) {
      const N* const of_slots = d_sums + q.at_sums + first_slot * q.theta_size;
      __syncwarp();  // T is complete here, as finish() wants it; and rows can share hidden features
      for (int s = 0; s < n_slots; ++s) of_products(q, of_slots + s * q.theta_size, row, at + s * q.in_padded, l0, l1);
      if (need_hidden && !q.constant) of_row(q, of_slots, n_slots, row, at, l0, l1);
    });
  }

  // d_t[v] = Σ_w dT[v, w] h[w], 0 in a row's padding
  __device__ __forceinline__ void of_products(const CouplingView& q, const N* of_slot, const int32_t* row, int at,
                                              int l0, int l1) {
    const int width = row_width(q.in_padded), step = 32 / width;
    for (int l = l0 + lane / width; l < l1; l += step) {
      const N* const h = this->of_edge(features, l);
      for (int v = lane & (width - 1); v < q.in_padded; v += width) {
        N sum{};
        if (q.constant && v < q.n_in) sum = of_slot[v];
        for (int w = 0; w < q.n_hidden && v < q.n_in && !q.constant; ++w)
          sum += of_slot[v * q.hidden_padded + w] * h[row[w]];
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
                         *product = this->of_edge(t + at, l) + s * q.in_padded;
          for (int v = 0; v < q.n_in; ++v) sum += of_slot[v * q.hidden_padded] * product[v];
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
    for (int n = 0; n < p.n_adjoint && a.grad_edge; ++n) {
      const int32_t* row = p.adjoint + 4 * n;
      for (int v = sub; v < row[1]; v += lanes) {
        N sum{};
        for (int i = row[2]; i < row[3]; ++i) sum += d_t[p.adjoint_from[i] + v] * g[p.adjoint_g[i]];
        d_f[row[0] + v] = sum;
      }
    }
    for (int n = 0; n < p.n_products && need_hidden; ++n) {
      const int32_t* product = p.products + 4 * n;
      for (int i = product[2] + sub; i < product[3]; i += lanes) {
        const N *const d = d_t + product[0], *const in = f + p.g_from[i];
        N sum{};
        for (int v = 0; v < product[1]; ++v) sum += d[v] * in[v];
        d_g[i] = sum;
      }
    }
  }

  // The gradients of the factor and of the harmonics, by one lane.
  __device__ __forceinline__ void factors_backward() {
    e.d_factor = N{};
    for (int m = 0; m < p.d; ++m) e.d_cosine[m] = e.d_sine[m] = N{};
    for (int k = 0; k < p.n_g; ++k)
      for (int n = p.g_first[k]; n < p.g_first[k + 1]; ++n) {
        const N d = d_g[k] * p.nz_value[n];
        e.d_factor += d * this->harmonic(n);
        if (p.nz_harmonic[n] >= 0) e.d_cosine[p.nz_harmonic[n]] += d * e.factor;
      }
  }

  __device__ __forceinline__ void store_features() {
    for (int i = sub; i < p.in_size && active; i += lanes) {
      N sum{};  // stays 0 for inputs that no coupling reads
      for (int k = places.first[i]; k < places.first[i + 1]; ++k) sum += d_f[places.at[k]];
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
    if (active && sub == 0) factors_backward();
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
