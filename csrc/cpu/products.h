// Products t[v] = Σ_g f[i_g, v] G_g of the neighbours' features f, for the edges of a tile, and their reverse.
#pragma once

#include "edge_tile.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Products {
  using V = typename Lane<R>::V;
  using Q = typename Lane<R>::Q;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;

  const PlanView<Real<R>>& p;
  V* g;            // [n_g] the factors G
  R *t, *d_t;      // [L, product_size]
  R* d_f;          // [L, n_gathered]
  R* d_harmonics;  // [d, L, QL] sums over QL are the harmonics' gradients

  explicit Products(const PlanView<Real<R>>& plan) : p(plan) {}

  void place(Arena& arena, bool backward) {
    arena.take(g, p.n_g), arena.take(t, int64_t{L} * p.product_size);
    if (!backward) return;
    arena.take(d_t, int64_t{L} * p.product_size), arena.take(d_f, int64_t{L} * p.n_gathered);
    arena.take(d_harmonics, int64_t{p.d} * L * QL);
  }

  // Once, after place(): the factors without a harmonic stay as they are.
  void set_constant_factors() {
    for (int k = 0; k < p.n_g; ++k) {
      g[k] = V{};
      for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z) g[k] += p.nz_value[z];
    }
  }

  void evaluate(const EdgeTile<R>& tile) {
    for (int k = 0; k < p.n_g && p.kind == kZonal; ++k) {
      if (p.nz_harmonic[p.g_first[k]] < 0) continue;  // constant
      V sum{};
      for (int z = p.g_first[k]; z < p.g_first[k + 1]; ++z) sum += tile.e.first[p.nz_harmonic[z]] * p.nz_value[z];
      g[k] = sum;
    }
    const auto factor = [&](int k) { return g + k; };
    for (const int32_t* sum = p.products; sum < p.products + 4 * p.n_products; sum += 4)
      sum_terms(tile.n_edges, sum, p.g_from, factor, tile.inputs, t, p.product_size);
  }

  // d_f and, with `need_harmonics`, d_harmonics from d_t.
  void reverse(const EdgeTile<R>& tile, bool need_harmonics) {
    const R* rows[L];
    for (int l = 0; l < L; ++l) rows[l] = d_t + int64_t{l} * p.product_size;
    const auto factor = [&](int k) { return g + p.adjoint_g[k]; };
    for (const int32_t* sum = p.adjoint; sum < p.adjoint + 4 * p.n_adjoint; sum += 4)
      sum_terms(tile.n_edges, sum, p.adjoint_from, factor, rows, d_f, p.n_gathered);
    for (int n = 0; n < p.n_harmonic_terms && need_harmonics;) {
      const int m = p.harmonic_terms[4 * n], first = n;
      while (n < p.n_harmonic_terms && p.harmonic_terms[4 * n] == m) ++n;
      if (p.degree[m] > 0) reverse_harmonic(tile, d_harmonics + m * L * QL, first, n);
    }
  }

  // ---- out[l][place + v] = Σ_k in[l][from[k] + v] factor(k)[l] for all edges l

  // sum: place, size of a row of v, first k, one past the last
  template <typename Factor>
  IST_INLINE void sum_terms(int n_edges, const int32_t* sum, const int32_t* from, Factor factor, const R* const* in,
                            R* out, int64_t stride) {
    int x = 0;
    for (; L > QL && x + L <= sum[1]; x += L) sum_columns<V>(n_edges, sum, from, factor, in, out, stride, x);
    for (; x < sum[1]; x += QL) sum_columns<Q>(n_edges, sum, from, factor, in, out, stride, x);
  }
  // The same of a T of v, from x on.
  template <typename T, typename Factor>
  IST_INLINE void sum_columns(int n_edges, const int32_t* sum, const int32_t* from, Factor factor, const R* const* in,
                              R* out, int64_t stride, int x) {
    const int first = sum[2], last = sum[3];
    R* to = out + sum[0] + x;
    int k = first;
    switch ((last - first) % 3) {
      case 1:
        add_terms<T, true, 1>(n_edges, from + k, x, factor(k), nullptr, nullptr, in, to, stride);
        k += 1;
        break;
      case 2:
        add_terms<T, true, 2>(n_edges, from + k, x, factor(k), factor(k + 1), nullptr, in, to, stride);
        k += 2;
        break;
      default:
        if (first == last)
          add_terms<T, true, 0>(n_edges, from, x, nullptr, nullptr, nullptr, in, to, stride);
        else
          add_terms<T, true, 3>(n_edges, from + k, x, factor(k), factor(k + 1), factor(k + 2), in, to, stride);
        k += 3;
    }
    for (; k < last; k += 3)
      add_terms<T, false, 3>(n_edges, from + k, x, factor(k), factor(k + 1), factor(k + 2), in, to, stride);
  }
  // The same of N terms, N <= 3, as many as addresses stay in registers; the first ones, or added to what is there.
  template <typename T, bool kFirst, int N>
  IST_INLINE void add_terms(int n_edges, const int32_t* from, int x, const V* a0, const V* a1, const V* a2,
                            const R* const* in, R* out, int64_t stride) {
    const V* const factors[] = {a0, a1, a2};
    int64_t at[3] = {};
    for (int k = 0; k < N; ++k) at[k] = from[k] + x;
    for (int l = 0; l < n_edges; ++l, out += stride) {
      T total{};
      if (!kFirst) total = load_numbers<T>(out);
      for (int k = 0; k < N; ++k) total += load_numbers<T>(in[l] + at[k]) * number(*factors[k], l);
      store_numbers(out, total);
    }
  }

  // ---- out[l] = Σ value f d_t over the terms first .. last-1 of a harmonic

  void reverse_harmonic(const EdgeTile<R>& tile, R* out, int first, int last) {
    const int32_t* term = p.harmonic_terms;
    for (int k = first; k < last;)
      if (k + 1 < last && term[4 * k + 3] == term[4 * k + 7])
        add_harmonic_terms<2>(tile, k == first, k, out), k += 2;
      else
        add_harmonic_terms<1>(tile, k == first, k, out), k += 1;
  }
  // N terms, of the same size; the first ones, or added to what is there.
  template <int N>
  IST_INLINE void add_harmonic_terms(const EdgeTile<R>& tile, bool is_first, int first, R* out) {
    const int32_t* term = p.harmonic_terms + 4 * first;
    const int lanes = tile.n_edges;
    for (int x = 0; x < term[3]; x += QL) {
      int64_t at[N], at_t[N];
      Real<R> value[N];
      for (int k = 0; k < N; ++k)
        at[k] = term[4 * k + 1] + x, at_t[k] = term[4 * k + 2] + x, value[k] = p.harmonic_term_value[first + k];
      const R* d = d_t;
      R* to = out;
      for (int l = 0; l < lanes; ++l, to += QL, d += p.product_size) {
        Q total{};
        if (!is_first || x > 0) total = load_row(to);
        for (int k = 0; k < N; ++k) total += load_row(tile.inputs[l] + at[k]) * load_row(d + at_t[k]) * value[k];
        store_row(to, total);
      }
    }
  }
};

}  // namespace implicit_steer::IST_ISA
