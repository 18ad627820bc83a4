// A table in place of the MLP: y = Σ_j w_j(u) b_j over four of the splines' coefficients of an edge's type, each a row
// of all hidden coefficients that couplings read, and the reverse sweep. Rows are interpolated edge by edge, then
// turned into lanes.
#pragma once

#include "../spline_pieces.h"
#include "rows.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Splines {
  using V = typename Lane<R>::V;
  using Q = typename Lane<R>::Q;
  using Plain = Real<R>;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL, kPieces = SplinePieces<V>::n;

  const PlanView<Plain>* p;
  const R* table;     // [types · splines per type, row]
  int64_t pad = 0;    // of a row of channels
  int64_t row = 0;    // of table_row()
  int64_t n_numbers;  // of the whole table
  V *y, *d_y;         // [hidden_flat], y is 0 where nothing reads it
  V* read;            // [row] of y or d_y
  Plain* rows;        // [kPlanes, L, row] y or d_y edge by edge
  SplinePieces<V> pieces;
  V scaled[kPieces];  // their weights, times what interpolate() was given
  int64_t first[L];   // where they begin in the table
  R *d_table, *d_u;   // as table, summed over all tiles of a block; [L, QL], sums over QL are ∂L/∂u
  R* d_pieces;        // [kPieces, L, QL] sums over QL are the gradients of the pieces' weights

  void place(Arena& arena, const PlanView<Plain>& plan, const R* packed, bool backward) {
    p = &plan, table = packed + plan.table_at, pad = padded(plan.channels), row = table_row(plan);
    n_numbers = int64_t{plan.n_types} * splines_per_type(plan) * row;
    arena.take(y, plan.hidden_flat), arena.take(read, row), arena.take(rows, kPlanes<R> * L * row);
    if (!backward) return;
    arena.take(d_y, plan.hidden_flat), arena.take(d_table, n_numbers), arena.take(d_u, int64_t{L} * QL);
    arena.take(d_pieces, int64_t{kPieces} * L * QL);
  }

  // The pieces of B around u of every edge, and where they begin in the table.
  IST_INLINE void locate(const Edges<R>& e) {
    const V position = spline_position(*p, e.radius);
    const auto* values = plane<R>(&position, 0);
    const auto* type = p->n_attr ? plane<R>(e.attr, 0) : nullptr;
    typename Lane<Plain>::V cells;
    const int splines = static_cast<int>(splines_per_type(*p)), size = static_cast<int>(row);
    for (int l = 0; l < L; ++l) {
      const int cell = spline_cell(*p, Plain(number(*values, l)));
      cells[l] = static_cast<Plain>(cell), first[l] = cell * size;
    }
    for (int l = 0; l < L && type; ++l) first[l] += spline_type(*p, Plain(number(*type, l))) * splines * size;
    pieces = spline_pieces(*p, e.radius, position, cells);
  }

  // Every edge's row of what the couplings read, times its `scale`.
  void interpolate(const Edges<R>& e, V scale) {
    locate(e);
    for (int k = 0; k < kPieces; ++k) scaled[k] = pieces.weights[k] * scale;
    for (int l = 0; l < L; ++l) {
      R w[kPieces];
      for (int k = 0; k < kPieces; ++k) w[k] = number(scaled[k], l);
      int64_t x = 0;
      for (; x + L <= row; x += L) store(blend<V>(l, x, w), l, x);
      for (; x < row; x += QL) store(blend<Q>(l, x, w), l, x);
    }
  }

  // What the couplings read, in lanes.
  const V* hidden(const Edges<R>& e) {
    interpolate(e, V{} + 1);
    for (int k = 0; k < kPlanes<R>; ++k)
      rows_to_lanes<Plain>(
          static_cast<int>(row), [&](int l) { return edge_row(k, l); },
          [&](int, int at, int count) { return at + count <= row; }, plane<R>(read, k), kPlanes<R>);
    for (int w = 0; w < p->channels; ++w)
      for (int k = 0; k < p->n_read; ++k) y[w * p->c + k] = read[k * pad + w];
    return y;
  }

  // From the gradient of hidden() (in this->d_y), of the first n_edges lanes: d_table and e.d_radius.
  void backward(Edges<R>& e, int n_edges, bool need_weights, bool need_radius) {
    for (int k = 0; k < p->n_inputs; ++k) e.d_inputs[k] = V{};
    for (int w = 0; w < p->channels; ++w)
      for (int k = 0; k < p->n_read; ++k) read[k * pad + w] = d_y[w * p->c + k];
    for (int k = 0; k < kPlanes<R>; ++k)
      lanes_to_rows<Plain>(
          static_cast<int>(row), plane<R>(read, k), kPlanes<R>, [&](int l) { return edge_row(k, l); }, n_edges);
    for (int l = 0; l < n_edges; ++l) {
      if (need_weights) add_to_table(l);
      if (need_radius) differentiate(l);
    }
    if (need_radius) e.d_radius += row_sums(d_u);
  }

  // From the gradients of interpolate()'s rows, [n_edges, row]: d_table, e.d_radius, and e.d_factor where the scale was
  // e.factor.
  void backward_of_rows(Edges<R>& e, const R* d_rows, int n_edges, bool need_weights) {
    for (int k = 0; k < p->n_inputs; ++k) e.d_inputs[k] = V{};
    for (int l = 0; l < n_edges; ++l) need_weights ? reverse_row<true>(l, d_rows) : reverse_row<false>(l, d_rows);
    for (int l = n_edges; l < L; ++l)
      for (int k = 0; k < kPieces; ++k) store_row(d_pieces + (k * L + l) * QL, Q{});
    for (int k = 0; k < kPieces; ++k) {
      const V d = row_sums(d_pieces + k * L * QL);
      e.d_factor += pieces.weights[k] * d, e.d_radius += pieces.slopes[k] * d * e.factor;
    }
  }
  template <bool kNeedWeights>
  void reverse_row(int l, const R* d_rows) {
    R w[kPieces];
    Q sums[kPieces] = {};
    for (int k = 0; k < kPieces; ++k) w[k] = number(scaled[k], l);
    for (int64_t x = 0; x < row; x += QL) {
      const Q d = load_row(d_rows + l * row + x);
      const R* piece = table + first[l] + x;
      R* d_piece = d_table + first[l] + x;
      for (int k = 0; k < kPieces; ++k, piece += row, d_piece += row) {
        sums[k] += load_row(piece) * d;
        if (kNeedWeights) store_row(d_piece, load_row(d_piece) + d * w[k]);
      }
    }
    for (int k = 0; k < kPieces; ++k) store_row(d_pieces + (k * L + l) * QL, sums[k]);
  }

  void add_to_table(int l) {
    R w[kPieces];
    for (int k = 0; k < kPieces; ++k) w[k] = number(pieces.weights[k], l);
    for (int64_t x = 0; x < row; x += QL) {
      const Q d = load(l, x);
      R* piece = d_table + first[l] + x;
      for (int k = 0; k < kPieces; ++k) store_row(piece + k * row, load_row(piece + k * row) + d * w[k]);
    }
  }

  void differentiate(int l) {
    R w[kPieces];
    for (int k = 0; k < kPieces; ++k) w[k] = number(pieces.slopes[k], l);
    Q total{};
    for (int64_t x = 0; x < row; x += QL) total += blend<Q>(l, x, w) * load(l, x);
    store_row(d_u + l * QL, total);
  }

  // An edge's row of values or, of dual numbers, of tangents; what fills it up stays 0.
  Plain* edge_row(int which, int l) const { return rows + (int64_t{which} * L + l) * row; }

  void write_gradient(Plain* out) const {
    for (int64_t k = 0; k < n_numbers; ++k) out[p->table_at + k] = result(d_table[k]);
  }

 private:
  // Σ_k w_k b_k of edge l, a T of them from x on
  template <typename T>
  IST_INLINE T blend(int l, int64_t x, const R* w) const {
    const R* piece = table + first[l] + x;
    T sum = load_numbers<T>(piece) * w[0];
    for (int k = 1; k < kPieces; ++k) sum += load_numbers<T>(piece + k * row) * w[k];
    return sum;
  }
  template <typename T>
  IST_INLINE void store(T q, int l, int64_t x) {
    if constexpr (is_dual<R>)
      store_numbers(edge_row(0, l) + x, q.value), store_numbers(edge_row(1, l) + x, q.tangent);
    else
      store_numbers(edge_row(0, l) + x, q);
  }
  Q load(int l, int64_t x) const {
    using P = typename Lane<Plain>::Q;
    if constexpr (is_dual<R>)
      return {load_numbers<P>(edge_row(0, l) + x), load_numbers<P>(edge_row(1, l) + x)};
    else
      return load_numbers<P>(edge_row(0, l) + x);
  }
};

}  // namespace implicit_steer::IST_ISA
