// Backward: per node dT = θᵀ g, per tile the forward again and its reverse sweep.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Backward : Worker<R> {
  using Base = Worker<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::weights, Base::mixed, Base::grads, Base::sums, Base::ring, Base::n_ring, Base::size,
      Base::e, Base::mlp;
  using Base::d_theta, Base::d_sums, Base::d_sums_t, Base::d_terms, Base::d_rows, Base::rows, Base::row_at;
  using Base::n_edges, Base::edge, Base::shell, Base::near_pass;
  using Base::t, Base::d_t, Base::f, Base::d_f, Base::f_raw, Base::d_f_raw, Base::g, Base::d_g, Base::hidden,
      Base::d_hidden;
  static constexpr int L = Lane<R>::L;
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
    return d_theta + (q.theta - p.couplings[0].theta) + int64_t{b} * q.n_out * q.slot_size;
  }

  // d_sums of the node, and its transpose [slot][w][v]
  void start(int64_t node) {
    if (++current >= n_prepared || prepared[current] != node) prepare(node);
    const R* d_node = d_sums + current * size.sums;
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int slot = 0; slot < q.n_slots && !q.constant; ++slot) {
        R* transposed = d_sums_t + q.at_sums_t + int64_t{slot} * q.n_hidden * q.in_padded;
        transpose_rows(q.n_in, q.n_hidden, d_node + q.at_sums + slot * q.slot_size, q.hidden_padded, transposed,
                       q.in_padded);
      }
    }
    if (!need_weights) return;
    memset(static_cast<void*>(sums + n_ring * size.sums), 0, sizeof(R) * size.sums);
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
    const R* weight = weights + q.theta + int64_t{b} * q.n_out * q.slot_size;
    const R* node[kNodes];
    for (int n = 0; n < kNodes; ++n) node[n] = whole(mixed + n * p.n_mixed + q.out_at + o * q.out_padded);
    R* d = d_sums + q.at_sums + slot * q.slot_size;
    for (int64_t x = 0; x < q.slot_size; x += Lane<R>::QL) {
      Q acc[kNodes] = {};
      for (int u = 0; u < q.n_out; ++u) {
        const Q row = load_row(weight + u * q.slot_size + x);
        for (int n = 0; n < kNodes; ++n) acc[n] += row * node[n][u];
      }
      for (int n = 0; n < n_prepared; ++n) store_row(d + n * size.sums + x, acc[n]);
    }
  }

  // dt [term][edge][v] and d_rows [row][edge][w] of the lanes l0 .. l1-1, all into one node.
  void run(int l0, int l1) {
    if (need_weights) this->accumulate(sums + n_ring * size.sums, l0, l1);
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int n = 0; n < q.n_terms; ++n) {
        const int slot = q.terms[3 * n], row = q.terms[3 * n + 1];
        const V* product = t + q.terms[3 * n + 2];
        const R* d = d_sums + current * size.sums + q.at_sums + slot * q.slot_size;
        R* d_term = d_terms + q.at_d_terms + (int64_t{n} * L + l0) * q.in_padded;
        if (q.constant) {
          for (int l = l0; l < l1; ++l, d_term += q.in_padded)
            memcpy(static_cast<void*>(d_term), d, sizeof(R) * q.n_in);
          continue;
        }
        const int64_t pad = q.hidden_padded;
        const int64_t at = row_at[row] + l0 * pad;
        memset(static_cast<void*>(d_term), 0, sizeof(R) * (l1 - l0) * q.in_padded);
        rank_updates(l1 - l0, d_term, q.in_padded, numbers_at(rows + at, pad, 1),
                     d_sums_t + q.at_sums_t + int64_t{slot} * q.n_hidden * q.in_padded, q.in_padded, 0, q.n_hidden,
                     q.in_padded);
        if (need_hidden) rank_updates(l1 - l0, d_rows + at, pad, lane_by_lane(product, l0), d, pad, 0, q.n_in, pad);
      }
    }
  }

  // dθ [b][u][v, w] += Σ_n g_n[u, o] T_n[slot][v, w] over the nodes in the ring
  void flush() {
    for (int k = 0; k < p.n_couplings && need_weights; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int slot = 0; slot < q.n_slots; ++slot) {
        const int b = q.slots[2 * slot], o = q.slots[2 * slot + 1];
        rank_updates(q.n_out, theta_gradient(q, b), q.slot_size,
                     numbers_at(grads + q.out_at + o * q.out_padded, 1, p.n_mixed),
                     sums + q.at_sums + slot * q.slot_size, size.sums, 0, n_ring, q.slot_size);
      }
    }
    n_ring = 0;
  }

  // ---- the reverse sweep of one tile

  // df and dG from dt; zero in lanes past the end.
  void couplings() {
    const bool harmonics = p.kind == kZonal && need_geometry;
    for (int k = 0; k < p.n_gathered; ++k) d_f[k] = V{};
    for (int k = 0; k < p.n_g; ++k) d_g[k] = V{};
    for (int k = 0; k < p.product_size; ++k) d_t[k] = V{};
    if (n_edges < L) clear_padding();
    units_to_lanes<R>(this->n_term_units, this->term_units, d_terms, d_t);
    for (int n = 0; n < p.n_products; ++n) {
      const int32_t* product = p.products + 5 * n;
      const int n_in = product[1];
      const V* d = d_t + product[4];
      int v = 0;
      for (; v + 8 <= n_in; v += 8) product_backward<8>(product, v, d + v, harmonics);
      for (; v + 2 <= n_in; v += 2) product_backward<2>(product, v, d + v, harmonics);
      for (; v < n_in; ++v) product_backward<1>(product, v, d + v, harmonics);
    }
  }

  template <int N>
  IST_INLINE void product_backward(const int32_t* product, int first, const V* d_product, bool harmonics) {
    V d[N];
    for (int v = 0; v < N; ++v) d[v] = d_product[v];
    for (int i = product[2]; i < product[3]; ++i) {
      const V factor = g[i];
      const int at = product[0] + p.g_input[i] * product[1] + first;
      V* d_input = whole(d_f + at);
      for (int v = 0; v < N; ++v) d_input[v] += d[v] * factor;
      if (!harmonics) continue;
      const V* input = whole(f + at);
      V sum{};
      for (int v = 0; v < N; ++v) sum += d[v] * input[v];
      d_g[i] += sum;
    }
  }

  // Rows past the last edge of an incomplete tile hold what an earlier tile left there.
  void clear_padding() {
    for (int k = 0; k < p.n_couplings; ++k) {
      const CouplingView& q = p.couplings[k];
      for (int n = 0; n < q.n_terms; ++n)
        memset(static_cast<void*>(d_terms + q.at_d_terms + (int64_t{n} * L + n_edges) * q.in_padded), 0,
               sizeof(R) * (L - n_edges) * q.in_padded);
    }
  }

  void hidden_features() {
    for (int k = 0; k < p.hidden_flat; ++k) d_hidden[k] = V{};
    units_to_lanes<R>(this->n_row_units, this->row_units, d_rows, d_hidden);
    memset(static_cast<void*>(d_rows), 0, sizeof(R) * this->row_size);
    this->sweep_mlp(need_weights, need_geometry);
  }

  void end_tile() {
    couplings();
    e.d_factor = V{};
    for (int k = 0; k < p.in_size && p.n_gathered < p.in_size; ++k) d_f_raw[k] = V{};  // inputs that no coupling reads
    for (int k = 0; k < p.n_gathered; ++k) {
      e.d_factor += d_f[k] * f_raw[p.input[k]];
      d_f_raw[p.input[k]] = d_f[k] * e.factor;
    }
    if (a.grad_edge) this->store(d_f_raw, p.in_size, a.grad_edge);
    if (!need_hidden) return;
    hidden_features();
    if (!need_geometry) {
      e.d_shell += e.d_factor * e.factor * e.squared;
      return;
    }
    if (p.kind == kZonal)
      for (int k = 0; k < p.n_g; ++k)
        for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z)
          if (p.nz_harmonic[z] >= 0) e.d_cosine[p.nz_harmonic[z]] += d_g[k] * p.nz_value[z];
    this->sweep_frame();
  }

  void nodes(int64_t first, int64_t last, Real<R>* grad_weights) {
    last_node = last;
    const auto begin = [&](int64_t i) { start(i); };
    const auto lanes = [&](int l0, int l1) { run(l0, l1); };
    const auto finish = [&](int64_t i) {
      ring[n_ring++] = i;
      if (n_ring == kNodes) flush();
    };
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
