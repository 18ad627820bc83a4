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
  static constexpr int M = kVectors<R>;
  using Base::a, Base::p, Base::weights, Base::tile, Base::mixed, Base::ring, Base::ring_size, Base::n_ring,
      Base::node_sums, Base::node_mixed;
  R* sums;                 // T of ring_size nodes, as [w][slot, v]
  bool again[kMostNodes];  // whether a node of the ring comes from the near list: as all those, once more

  Forward(const ConvArgs<Real<R>>& args, int64_t own_edges) : Base(args, own_edges) {
    allocate(a, this->near, [&](Arena& arena) {
      this->place(arena, false);
      arena.take(sums, ring_size * node_sums);
    });
    this->products.set_constant_factors();
  }

  // mixed[n, o, u] += Σ_{v, w} θ[b, v, w, u] T_n[w, slot, v] of slots with the same b for the nodes in the ring; in a
  // depthwise coupling v is u
  void mix(const Group& group, Slots slots) {
    const CouplingView& q = group.q;
    const R* weight =
        weights + q.theta_forward + slots.b * (q.depthwise ? q.n_hidden * q.out_stride : q.forward_size());
    // For one piece of T after the other, which stays in a near cache; of θ for M T of outputs even in the nearest.
    constexpr int64_t kWide = M * L > kPanel ? M * L : kPanel;
    const int64_t fit = kNearestCache / (kWide * static_cast<int64_t>(sizeof(R))) / q.n_hidden;
    const int together = q.depthwise || fit > q.n_in ? q.n_in : fit < 1 ? 1 : static_cast<int>(fit);
    for (int v = 0; v < q.n_in; v += together) {
      const int end = v + together < q.n_in ? v + together : q.n_in;
      int u = 0;
      for (; u + M * L <= q.out_stride; u += M * L) mix_slots<V, M>(group, slots, weight, v, end, u);
      for (; M > 1 && u + L <= q.out_stride; u += L) mix_slots<V, 1>(group, slots, weight, v, end, u);
      for (; u < q.n_out; u += QL) mix_slots<Q, 1>(group, slots, weight, v, end, u);
    }
  }
  // W T of outputs from u on, of all nodes, from the inputs v .. end-1
  template <typename T, int W>
  IST_INLINE void mix_slots(const Group& group, Slots slots, const R* weight, int v, int end, int u) {
    const CouplingView& q = group.q;
    const auto mix_rows = [&](const R* const* node, R* out) {
      if (q.depthwise)
        for (int m = 0; m < W; ++m) mix_channels<T, kTogether<W>>(group, weight, node, out, u + m * kWidth<T>);
      else
        mix_block<T, W>(group, weight, node, out, v, end, u);
    };
    for (int slot = slots.first; slot < slots.end; ++slot) {
      const R* sums_of = sums + group.sums + (slot - group.first) * q.in_stride;
      for_nodes<kTogether<W>>(n_ring, sums_of, node_sums, mixed + q.place_of_output(slot), node_mixed, mix_rows);
    }
  }
  // of kTogether<W> nodes
  template <typename T, int W>
  IST_INLINE void mix_block(const Group& group, const R* weight, const R* const* node, R* out, int v, int end, int u) {
    const CouplingView& q = group.q;
    const int64_t width = q.panel_width(u), first = q.forward_place(u), step = q.forward_place(u + kWidth<T>) - first;
    weight += first + v * q.n_hidden * width, out += u;
    constexpr int N = kTogether<W>;
    T acc[N * W] = {};
    for (; v < end; ++v)
      for (int64_t x = v; x < q.n_hidden * group.stride; x += group.stride, weight += width)
        add_term<N, W>(acc, [&](int n, int) { return node[n][x]; }, weight, 0, step);
    for (int n = 0; n < N; ++n, out += node_mixed)
      for (int m = 0; m < W; ++m)
        store_numbers(out + m * kWidth<T>, load_numbers<T>(out + m * kWidth<T>) + acc[n * W + m]);
  }

  // T channels from u on of N nodes, each by itself
  template <typename T, int N>
  IST_INLINE void mix_channels(const Group& group, const R* weight, const R* const* node, R* out, int u) {
    T acc[N] = {};
    for (int w = 0; w < group.q.n_hidden; ++w, weight += group.q.out_stride) {
      const T factor = load_numbers<T>(weight + u);
      for (int n = 0; n < N; ++n) acc[n] += load_numbers<T>(node[n] + w * group.stride + u) * factor;
    }
    for (int n = 0; n < N; ++n, out += node_mixed) store_numbers(out + u, load_numbers<T>(out + u) + acc[n]);
  }

  void flush() {
    memset(static_cast<void*>(mixed), 0, sizeof(R) * ring_size * node_mixed);
    for_slots(p.couplings, p.n_couplings, [&](const Group& group, Slots slots) { mix(group, slots); });
    for (int n = 0; n < n_ring; ++n) {
      const R* in = mixed + n * node_mixed;
      Real<R>* out = a.out + ring[n] * p.out_size;
      for (int k = 0; k < p.out_size; ++k) {
        const Real<R> value = p.mixed_place[k] < 0 ? 0 : result(in[p.mixed_place[k]]);
        out[k] = again[n] ? out[k] + value : value;
      }
    }
    n_ring = 0;
  }

  void nodes(int64_t first, int64_t last) {
    const auto node = [&] { return sums + n_ring * node_sums; };
    const auto start = [&](int64_t) { this->untouched = true; };
    const auto run = [&](int l0, int l1) { this->accumulate(node(), l0, l1); };
    const auto finish = [&](int64_t i) {
      this->complete(node());
      again[n_ring] = tile.e.near_origin, ring[n_ring++] = i;
      if (n_ring == ring_size) flush();
    };
    const auto empty = [&](int64_t i) { memset(a.out + i * p.out_size, 0, sizeof(Real<R>) * p.out_size); };
    this->walk(first, last, start, run, finish, empty, [] {});
    this->walk_near(start, run, finish, [] {});
    if (n_ring) flush();
  }
};

}  // namespace implicit_steer::IST_ISA
