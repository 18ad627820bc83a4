// Forward: out_i = Σ_b θ_b T_i[b], T_i summed over the node's edges tile by tile.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Forward : Worker<R> {
  using Base = Worker<R>;
  using Q = typename Lane<R>::Q;
  using Base::a, Base::p, Base::theta, Base::sums, Base::mixed, Base::ring, Base::n_ring, Base::size;

  Forward(const ConvArgs<R>& args, const CouplingSizes& sizes) : Base(args, sizes, false) { pack_theta(); }

  // θ [u, v, w, b] -> [b][v][w][u], u padded
  void pack_theta() {
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView& q = p.couplings[k];
      const R* in = a.weights + q.theta;
      R* out = theta + q.at_theta;
      for (int u = 0; u < q.n_out; ++u)
        for (int vw = 0; vw < q.n_in * q.n_hidden; ++vw)
          for (int b = 0; b < q.n_basis; ++b) out[(int64_t{b} * q.n_in * q.n_hidden + vw) * q.out_padded + u] = *in++;
    }
  }

  // mixed[n, out_start[u] + o] += Σ_{v, w} θ[b, v, w, u] T_n[slot, v, w] for the nodes in the ring
  void mix_slot(const CouplingView& q, int slot) {
    const int b = q.slots[2 * slot], o = q.slots[2 * slot + 1];
    const R* t = sums + q.at_sums + slot * q.slot_size;
    for (int u0 = 0; u0 < q.n_out; u0 += Lane<R>::QL) {
      const R* weight = theta + q.at_theta + int64_t{b} * q.n_in * q.n_hidden * q.out_padded + u0;
      Q acc[kNodes] = {};
      for (int v = 0; v < q.n_in; ++v)
        for (int w = 0; w < q.n_hidden; ++w, weight += q.out_padded) {
          const Q row = load_row(weight);
          const R* value = t + v * q.hidden_padded + w;
          for (int n = 0; n < kNodes; ++n) acc[n] += row * value[n * size.sums];
        }
      const int n_u = q.n_out - u0 < Lane<R>::QL ? q.n_out - u0 : Lane<R>::QL;
      for (int n = 0; n < n_ring; ++n)
        for (int u = 0; u < n_u; ++u) mixed[n * p.out_size + q.out_start[u0 + u] + o] += acc[n][u];
    }
  }

  void flush() {
    memset(mixed, 0, sizeof(R) * n_ring * p.out_size);
    for (int k = 0; k < p.n_couplings; ++k)
      for (int slot = 0; slot < p.couplings[k].n_slots; ++slot) mix_slot(p.couplings[k], slot);
    for (int n = 0; n < n_ring; ++n)
      memcpy(a.out + ring[n] * p.out_size, mixed + n * p.out_size, sizeof(R) * p.out_size);
    n_ring = 0;
  }

  void nodes(int64_t first, int64_t last) {
    this->walk(
        first, last, [&](int64_t) { memset(sums + n_ring * size.sums, 0, sizeof(R) * size.sums); },
        [&](int64_t, int l0, int l1) { this->accumulate(sums + n_ring * size.sums, l0, l1); },
        [&](int64_t i) {
          ring[n_ring++] = i;
          if (n_ring == kNodes) flush();
        },
        [&](int64_t i) { memset(a.out + i * p.out_size, 0, sizeof(R) * p.out_size); }, [] {});
    if (n_ring) flush();
  }
};

}  // namespace implicit_steer::IST_ISA
