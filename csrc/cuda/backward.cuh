// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep, per node dθ += g ⊗ T.
#pragma once

#include "reverse.cuh"

namespace implicit_steer::IST_ISA {

template <typename N, typename S>
struct Backward : Reverse<N, true, S> {
  using R = Real<N>;
  using Base = Reverse<N, true, S>;
  using Base::a, Base::p, Base::weights, Base::e, Base::features, Base::f, Base::g, Base::t, Base::d_f, Base::d_g;
  using Base::by_coefficient, Base::need_geometry, Base::need_weights, Base::grad_weights;
  using Base::d_t, Base::d_hidden, Base::lane, Base::lanes, Base::sub, Base::active, Base::edge;
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
#pragma unroll 2
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
#pragma unroll 1
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
      if constexpr (S::hot)
        if (this->hot_coupling(q)) {
          of_products_hot(q, of_slots, n_slots, row[0], at, l0, l1);
          if (need_hidden) of_row_hot(q, of_slots, n_slots, row[0], at, l0, l1);
          return;
        }
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
#pragma unroll 2
        for (int w = 0; w < q.n_hidden && v < q.n_in && !q.constant; ++w)
          sum += of_slot[v * q.hidden_padded + w] * h[row[w]];
        this->of_edge(d_t, l)[at + v] = sum;
      }
    }
  }

  // As above for a block of T's slots, two products at a time.
  __device__ __forceinline__ void of_products_hot(const CouplingView& q, const N* of_slots, int n_slots,
                                                  int coefficient, int at, int l0, int l1) {
    const int per_slot = q.in_padded / 2, per_edge = n_slots * per_slot;
    for (int x = lane; x < (l1 - l0) * per_edge; x += 32) {
      const int l = l0 + x / per_edge, s = x % per_edge / per_slot, v = x % per_slot * 2;
      const N* const h = this->of_edge(by_coefficient + coefficient * S::width, l);
      const N* const of_slot = of_slots + s * q.theta_size;
      Neighbours<N, 2> sum{};
#pragma unroll
      for (int w = 0; w < S::width; w += 4) {
        const auto four = neighbours<4>(h + w);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (v + i < q.n_in) sum.at[i] += dot(four, neighbours<4>(of_slot + (v + i) * S::width + w));
      }
      neighbours<2>(this->of_edge(d_t + at + s * q.in_padded + v, l)) = sum;
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
#pragma unroll 2
          for (int v = 0; v < q.n_in; ++v) sum += of_slot[v * q.hidden_padded] * product[v];
        }
        this->of_edge(d_hidden, l)[row[w]] += sum;
      }
    }
  }

  // As above, four channels at a time. Lanes whose numbers differ in the highest bits divide the inputs among them.
  __device__ __forceinline__ void of_row_hot(const CouplingView& q, const N* of_slots, int n_slots, int coefficient,
                                             int at, int l0, int l1) {
    constexpr int quads = S::width / 4;
    const int w = lane % quads * 4, l = lane / quads % this->tile, owners = quads * this->tile, part = lane / owners;
    const bool inside = l0 <= l && l < l1;
    Neighbours<N, 4> sum{};
    for (int x = part; x < n_slots * q.in_padded && inside; x += 32 / owners) {
      const int s = x / q.in_padded, v = x % q.in_padded;
      if (v < q.n_in)
        add_multiple(sum, *this->of_edge(t + at + x, l), neighbours<4>(of_slots + s * q.theta_size + v * S::width + w));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum.at[k] = sum_lanes(sum.at[k], owners, 32);
      if (inside && part == 0) this->of_edge(d_hidden + coefficient + (w + k) * S::c, l)[0] += sum.at[k];
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

  // The gradients of the factor and of the harmonics, by one lane.
  __device__ __forceinline__ void factors_backward() {
    e.d_factor = N{};
    IST_ROLLED for (int m = 0; m < p.d; ++m) e.d_cosine[m] = e.d_sine[m] = N{};
    IST_ROLLED for (int k = 0; k < p.n_g; ++k) IST_ROLLED for (int n = p.g_first[k]; n < p.g_first[k + 1]; ++n) {
      const N d = d_g[k] * p.nz_value[n];
      e.d_factor += d * this->harmonic(n);
      if (p.nz_harmonic[n] >= 0) e.d_cosine[p.nz_harmonic[n]] += d * e.factor;
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
    if (active && sub == 0) factors_backward();
    this->sweep();
  }
};

template <typename N, typename S>
__global__ void __launch_bounds__(kThreads, kResident<N>) conv_backward(const __grid_constant__ Call<Real<N>> call) {
  Backward<N, S> warp(call);
  if (warp.number >= call.shape.warps) return;
  warp.clear_gradients();
  warp.walk(warp);
  warp.write_shell();
}

}  // namespace implicit_steer::IST_ISA
