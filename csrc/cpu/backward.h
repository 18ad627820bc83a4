// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Backward : Worker<R> {
  using Base = Worker<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::weights, Base::mixed, Base::grads, Base::sums, Base::slot_sums, Base::ring,
      Base::n_ring;
  using Base::d_harmonics, Base::t, Base::d_t, Base::g, Base::h, Base::inputs, Base::features, Base::d_hidden;
  using Base::d_theta, Base::d_sums, Base::d_sums_t, Base::d_rows, Base::row_at, Base::d_f, Base::d_one;
  using Base::size, Base::e, Base::mlp, Base::n_edges, Base::edge, Base::shell, Base::near_pass;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  bool need_geometry, need_weights, need_hidden;
  int64_t last_node = 0;
  int64_t prepared[kNodes];  // nodes whose ∂L/∂T stand in d_sums
  int n_prepared = 0, current = 0;

  Backward(const ConvArgs<Real<R>>& args, const CouplingSizes& sizes, int64_t own_edges)
      : Base(args, sizes, true, own_edges) {
    need_geometry = a.grad_delta || a.grad_attr;
    need_weights = a.grad_weights;
    need_hidden = need_geometry || need_weights;
    e.d_shell = V{};
  }

  // Position of θ [b][u] of a coupling in d_theta.
  R* theta_gradient(const CouplingView& q, int b) const {
    return d_theta + (q.theta - p.couplings[0].theta) + int64_t{b} * q.n_out * q.theta_size;
  }
  // Position of T[slot] of a coupling in slot_sums and d_sums.
  static int64_t at_slot(const CouplingView& q, int slot) {
    return q.at_slots + int64_t{slot} * q.in_stride * q.hidden_stride;
  }

  // ∂L/∂T of the node, in both layouts
  void start(int64_t node) {
    if (++current >= n_prepared || prepared[current] != node) prepare(node);
    for_groups(p.couplings, p.n_couplings, [&](const Group& group, const int32_t*, int) {
      const R* d = d_sums + current * size.slots + group.slots;
      if (group.q.constant)
        memcpy(static_cast<void*>(d_sums_t + group.sums), d, sizeof(R) * group.width);
      else
        transpose_rows(static_cast<int>(group.width), group.q.n_hidden, d, group.q.hidden_stride, d_sums_t + group.sums,
                       group.width);
    });
    this->untouched = true;
    if (!need_weights) return;
    memcpy(static_cast<void*>(grads + n_ring * p.n_mixed), mixed + current * p.n_mixed, sizeof(R) * p.n_mixed);
  }

  // d_sums [slot][v, w] = Σ_u θ[b, u, v, w] g[o, u] for this node and the next ones that have edges
  void prepare(int64_t node) {
    n_prepared = current = 0;
    prepared[n_prepared++] = node;
    for (int64_t i = node + 1; i < last_node && n_prepared < kNodes && !near_pass; ++i)
      if (a.index(a.rowptr, i) < a.index(a.rowptr, i + 1)) prepared[n_prepared++] = i;
    for (int n = 0; n < n_prepared; ++n)
      for (int k = 0; k < p.out_size; ++k)
        if (p.place[k] >= 0)
          mixed[n * p.n_mixed + p.place[k]] = constant_number<R>(a.grad_out[prepared[n] * p.out_size + k]);
    for (int k = 0; k < p.n_couplings; ++k)
      for (int slot = 0; slot < p.couplings[k].n_slots; ++slot) sum_outputs(p.couplings[k], slot);
  }

  void sum_outputs(const CouplingView& q, int slot) {
    using Q = typename Lane<R>::Q;
    const int b = q.slots[2 * slot], o = q.slots[2 * slot + 1];
    const R* weight = weights + q.theta + int64_t{b} * q.n_out * q.theta_size;
    const R* node[kNodes];
    for (int n = 0; n < kNodes; ++n) node[n] = opaque_pointer(mixed + n * p.n_mixed + q.out_at + o * q.out_stride);
    R* d = d_sums + at_slot(q, slot);
    constexpr int M = IST_LANE_BYTES == 64 && !is_dual<R> ? 2 : 1;  // as many as the registers hold
    int64_t x = 0;
    for (; x + M * L <= q.theta_size; x += M * L) sum_block<V, M>(q, weight + x, node, d + x);
    for (; M > 1 && x + L <= q.theta_size; x += L) sum_block<V, 1>(q, weight + x, node, d + x);
    for (; x < q.theta_size; x += QL) sum_block<Q, 1>(q, weight + x, node, d + x);
  }
  // M T numbers wide
  template <typename T, int M>
  IST_INLINE void sum_block(const CouplingView& q, const R* weight, const R* const* node, R* d) {
    T acc[kNodes * M] = {};
    for (int u = 0; u < q.n_out; ++u, weight += q.theta_size)
      add_term<kNodes, M>(acc, [&](int n, int) { return node[n][u]; }, weight, u);
    for (int n = 0; n < n_prepared; ++n)
      for (int m = 0; m < M; ++m) store_numbers(d + n * size.slots + m * kWidth<T>, acc[n * M + m]);
  }

  // d_t and d_rows of the lanes l0 .. l1-1, all into one node.
  void run(int l0, int l1) {
    if (need_weights) this->accumulate(sums, l0, l1);
    this->for_blocks([&](const Group& group, int row, int products) {
      const CouplingView& q = group.q;
      const int64_t at = int64_t{l0} * p.product_size + products, pad = q.hidden_stride;
      rank_updates<false>(l1 - l0, d_t + at, p.product_size, lane_by_lane(h + p.row_start[row], l0),
                          d_sums_t + group.sums, group.width, 0, q.n_hidden, group.width);
      const R* d = d_sums + current * size.slots + group.slots;
      if (q.constant)
        dots(l0, l1, t + at, d, group.width);
      else if (need_hidden)
        rank_updates(l1 - l0, d_rows + row_at[row] + l0 * pad, pad, numbers_at(t + at, p.product_size, 1), d, pad, 0,
                     static_cast<int>(group.width), pad);
    });
  }

  // d_one[l] += products of row l and d
  void dots(int l0, int l1, const R* row, const R* d, int64_t n) {
    for (int l = l0; l < l1; ++l, row += p.product_size) {
      typename Lane<R>::Q sum = load_row(d_one + l * QL);
      for (int64_t x = 0; x < n; x += QL) sum += load_row(row + x) * load_row(d + x);
      store_row(d_one + l * QL, sum);
    }
  }

  // T of a node, complete, slot by slot.
  void finish(int64_t node) {
    this->complete(sums);
    for_groups(p.couplings, p.n_couplings, [&](const Group& group, const int32_t*, int) {
      const CouplingView& q = group.q;
      R* out = slot_sums + n_ring * size.slots + group.slots;
      if (q.constant)
        memcpy(static_cast<void*>(out), sums + group.sums, sizeof(R) * group.width);
      else if (need_weights)
        transpose_rows(q.n_hidden, static_cast<int>(group.width), sums + group.sums, group.width, out, q.hidden_stride);
    });
    ring[n_ring++] = node;
    if (n_ring == kNodes) flush();
  }

  // dθ [b][u][v, w] += Σ_n g_n[u, o] T_n[slot][v, w] over the nodes in the ring
  void flush() {
    for (int k = 0; k < p.n_couplings && need_weights; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int slot = 0; slot < q.n_slots; ++slot) {
        const int b = q.slots[2 * slot], o = q.slots[2 * slot + 1];
        rank_updates(q.n_out, theta_gradient(q, b), q.theta_size,
                     numbers_at(grads + q.out_at + o * q.out_stride, 1, p.n_mixed), slot_sums + at_slot(q, slot),
                     size.slots, 0, n_ring, q.theta_size);
      }
    }
    n_ring = 0;
  }

  // ---- the reverse sweep of one tile

  // d_f and d_harmonics from d_t
  void products() {
    const R* rows[L];
    for (int l = 0; l < L; ++l) rows[l] = d_t + int64_t{l} * p.product_size;
    const auto factor = [&](int k) { return g + p.adjoint_g[k]; };
    for (const int32_t* sum = p.adjoint; sum < p.adjoint + 4 * p.n_adjoint; sum += 4)
      this->sum_products(sum, p.adjoint_from, factor, rows, d_f, p.n_gathered);
    for (int n = 0; n < p.n_harmonic_terms && need_geometry;) {
      const int m = p.harmonic_terms[4 * n], first = n;
      while (n < p.n_harmonic_terms && p.harmonic_terms[4 * n] == m) ++n;
      if (p.degree[m] > 0) harmonic(d_harmonics + m * L * QL, first, n);
    }
  }

  // out[l] = Σ value f d_t over the terms first .. last-1
  void harmonic(R* out, int first, int last) {
    const int32_t* term = p.harmonic_terms;
    for (int k = first; k < last;)
      if (k + 1 < last && term[4 * k + 3] == term[4 * k + 7])
        add_terms<2>(k == first, k, out), k += 2;
      else
        add_terms<1>(k == first, k, out), k += 1;
  }
  // N terms, of the same size; the first ones, or added to what is there.
  template <int N>
  IST_INLINE void add_terms(bool is_first, int first, R* out) {
    const int32_t* term = p.harmonic_terms + 4 * first;
    const int lanes = n_edges;
    for (int x = 0; x < term[3]; x += QL) {
      int64_t at[N], at_t[N];
      Real<R> value[N];
      for (int k = 0; k < N; ++k)
        at[k] = term[4 * k + 1] + x, at_t[k] = term[4 * k + 2] + x, value[k] = p.harmonic_term_value[first + k];
      const R* d = d_t;
      R* to = out;
      for (int l = 0; l < lanes; ++l, to += QL, d += p.product_size) {
        typename Lane<R>::Q total{};
        if (!is_first || x > 0) total = load_row(to);
        for (int k = 0; k < N; ++k) total += load_row(inputs[l] + at[k]) * load_row(d + at_t[k]) * value[k];
        store_row(to, total);
      }
    }
  }

  // d_f, of dual numbers the tangents, to grad_edge or into the sums over nodes
  void store_input_gradients() {
    using P = typename Lane<Real<R>>::Q;
    for (int l = 0; l < n_edges; ++l) {
      if (this->near_lanes >> l & 1) continue;  // a later tile has them
      Real<R>* out = a.grad_edge + (a.grad_by_node ? this->source[l] : edge[l]) * p.n_gathered;
      for (int k = 0; k < p.n_gathered; k += QL) {
        const auto row = plane_of(load_row(d_f + l * p.n_gathered + k));
        store_numbers(out + k, a.grad_by_node ? load_numbers<P>(out + k) + row : row);
      }
    }
  }
  // The tangent of dual numbers.
  template <typename Q>
  static IST_INLINE auto plane_of(Q row) {
    if constexpr (is_dual<R>)
      return row.tangent;
    else
      return row;
  }

  // From d_rows and d_one, which are 0 in lanes that do not count, and are so again afterwards.
  void hidden_features() {
    for (int k = 0; k < p.hidden_flat; ++k) d_hidden[k] = V{};
    units_to_lanes<R>(this->n_row_units, this->row_units, d_rows, d_hidden);
    e.d_factor = row_sums(d_one);
    for (int k = 0; k < p.hidden_flat; ++k) {
      e.d_factor += d_hidden[k] * features[k];
      d_hidden[k] *= e.factor;
    }
    memset(static_cast<void*>(d_rows), 0, sizeof(R) * this->row_size);
    memset(static_cast<void*>(d_one), 0, sizeof(R) * L * QL);
    this->sweep_mlp(need_weights, need_geometry);
  }

  void end_tile() {
    products();
    if (a.grad_edge) store_input_gradients();
    if (!need_hidden) return;
    hidden_features();
    if (!need_geometry) {
      e.d_shell += e.d_factor * e.factor * e.squared;
      return;
    }
    for (int m = 0; m < p.d && p.kind == kZonal; ++m)
      if (p.degree[m] > 0) e.d_first[m] += row_sums(d_harmonics + m * L * QL);
    this->sweep_frame();
  }

  void nodes(int64_t first, int64_t last, Real<R>* grad_weights) {
    last_node = last;
    const auto begin = [&](int64_t i) { start(i); };
    const auto lanes = [&](int l0, int l1) { run(l0, l1); };
    const auto finish = [&](int64_t i) { this->finish(i); };
    const auto sweep = [&] { end_tile(); };
    this->walk(first, last, begin, lanes, finish, [](int64_t) {}, sweep);
    flush();
    this->walk_near(begin, lanes, finish, sweep);
    flush();
    if (need_weights) write_weights(grad_weights);
  }

  void write_weights(Real<R>* out) {
    memset(out, 0, sizeof(Real<R>) * p.n_grad);
    this->write_mlp_weights(out);
    for (int64_t k = 0; k < this->theta_size(); ++k) out[p.couplings[0].theta + k] = result(d_theta[k]);
  }
};

}  // namespace implicit_steer::IST_ISA
