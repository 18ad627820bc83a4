// Forward: out_i = Σ_b θ_b T_i[b], T_i summed over the node's edges tile by tile.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Forward : Worker<R> {
  using Base = Worker<R>;
  using V = typename Lane<R>::V;
  using Q = typename Lane<R>::Q;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  static constexpr int kVectors = IST_LANE_BYTES == 64 && !is_dual<R> ? 2 : 1;  // of outputs: as many as registers hold
  static constexpr int kRowsAhead = 8;  // of θ: its rows are too far apart for the processor to foresee them
  using Base::a, Base::p, Base::weights, Base::tile, Base::mixed, Base::ring, Base::ring_size, Base::n_ring;
  R* sums;  // T of ring_size nodes, as [w][slot, v]

  Forward(const ConvArgs<Real<R>>& args, int64_t own_edges) : Base(args, own_edges) {
    allocate(a, this->near, [&](Arena& arena) {
      this->place(arena, false);
      arena.take(sums, ring_size * p.n_sums);
    });
    this->products.set_constant_factors();
  }

  // mixed[n, o, u] += Σ_{v, w} θ[b, v, w, u] T_n[w, slot, v] for the nodes in the ring; in a depthwise coupling v is u
  void mix(const Group& group, int slot) {
    const CouplingView& q = group.q;
    const int b = q.slots[2 * slot], o = q.slots[2 * slot + 1];
    const R* weight = weights + q.theta_forward + int64_t{b} * (q.depthwise ? 1 : q.n_in) * q.n_hidden * q.out_stride;
    const R* sums_of = sums + group.sums + (slot - group.first) * q.in_stride;
    R* out = mixed + q.out_at + o * q.out_stride;
    int u = 0;
    for (; u + kVectors * L <= q.out_stride; u += kVectors * L) mix_nodes<V, kVectors>(group, weight, sums_of, out, u);
    for (; kVectors > 1 && u + L <= q.out_stride; u += L) mix_nodes<V>(group, weight, sums_of, out, u);
    for (; u < q.n_out; u += QL) mix_nodes<Q>(group, weight, sums_of, out, u);
  }
  // M T of outputs from u on, of all nodes
  template <typename T, int M = 1>
  IST_INLINE void mix_nodes(const Group& group, const R* weight, const R* sums_of, R* out, int u) {
    for (int first = 0; first < n_ring; first += kNodes, sums_of += kNodes * p.n_sums, out += kNodes * p.n_mixed) {
      const R* node[kNodes];
      for (int n = 0; n < kNodes; ++n) node[n] = opaque_pointer(sums_of + n * p.n_sums);
      if (group.q.depthwise)
        for (int m = 0; m < M; ++m) mix_channels<T>(group, weight, node, out, u + m * kWidth<T>);
      else
        mix_block<T, M>(group, weight + u, node, out + u);
    }
  }
  // M T of outputs
  template <typename T, int M>
  IST_INLINE void mix_block(const Group& group, const R* weight, const R* const* node, R* out) {
    T acc[kNodes * M] = {};
    for (int v = 0; v < group.q.n_in; ++v)
      for (int64_t x = v; x < group.q.n_hidden * group.stride; x += group.stride, weight += group.q.out_stride) {
        for (int m = 0; m < M; ++m) __builtin_prefetch(weight + kRowsAhead * group.q.out_stride + m * kWidth<T>);
        add_term<kNodes, M>(acc, [&](int n, int) { return node[n][x]; }, weight, 0);
      }
    for (int n = 0; n < kNodes; ++n, out += p.n_mixed)
      for (int m = 0; m < M; ++m)
        store_numbers(out + m * kWidth<T>, load_numbers<T>(out + m * kWidth<T>) + acc[n * M + m]);
  }

  // T channels from u on, each by itself
  template <typename T>
  IST_INLINE void mix_channels(const Group& group, const R* weight, const R* const* node, R* out, int u) {
    T acc[kNodes] = {};
    for (int w = 0; w < group.q.n_hidden; ++w, weight += group.q.out_stride) {
      const T factor = load_numbers<T>(weight + u);
      for (int n = 0; n < kNodes; ++n) acc[n] += load_numbers<T>(node[n] + w * group.stride + u) * factor;
    }
    for (int n = 0; n < kNodes; ++n, out += p.n_mixed) store_numbers(out + u, load_numbers<T>(out + u) + acc[n]);
  }

  void flush() {
    memset(static_cast<void*>(mixed), 0, sizeof(R) * ring_size * p.n_mixed);
    for_groups(p.couplings, p.n_couplings, [&](const Group& group) {
      for (int slot = group.first; slot < group.first + group.n_slots; ++slot) mix(group, slot);
    });
    for (int n = 0; n < n_ring; ++n) {
      const R* in = mixed + n * p.n_mixed;
      Real<R>* out = a.out + ring[n] * p.out_size;
      for (int k = 0; k < p.out_size; ++k) {
        const Real<R> value = p.mixed_place[k] < 0 ? 0 : result(in[p.mixed_place[k]]);
        out[k] = tile.e.near_origin ? out[k] + value : value;  // in the near list's walk nodes come once more
      }
    }
    n_ring = 0;
  }

  void nodes(int64_t first, int64_t last) {
    const auto node = [&] { return sums + n_ring * p.n_sums; };
    const auto start = [&](int64_t) { this->untouched = true; };
    const auto run = [&](int l0, int l1) { this->accumulate(node(), l0, l1); };
    const auto finish = [&](int64_t i) {
      this->complete(node());
      ring[n_ring++] = i;
      if (n_ring == ring_size) flush();
    };
    const auto empty = [&](int64_t i) { memset(a.out + i * p.out_size, 0, sizeof(Real<R>) * p.out_size); };
    this->walk(first, last, start, run, finish, empty, [] {});
    if (n_ring) flush();
    this->walk_near(start, run, finish, [] {});
    if (n_ring) flush();
  }
};

}  // namespace implicit_steer::IST_ISA
