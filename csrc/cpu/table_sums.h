// How much a table's splines count among edges, from which batch statistics follow without the MLP's values there: in
// row j Σ_e w_j first_e, in planar frames also Σ_e w_j second_e, and Σ_e w_j w_{j+q} u_e^(2k) for q = 0 .. 3 and every
// coefficient, of order k.
#pragma once

#include "points.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct TableSums : Points<R> {
  using Base = Points<R>;
  using V = typename Lane<R>::V;
  using Base::p, Base::tile;
  static constexpr int L = Lane<R>::L;
  const int64_t width, row;
  const int64_t n_ways;  // numbers of a row that are linear in w
  V* lanes;              // [n_ways + c] first, second, u^(2k)
  R *rows, *sums;        // [L, the same] edge by edge; [types · splines per type, row]

  TableSums(const ConvArgs<R>& args, int64_t own_points)
      : Base(args, own_points), width(table_sums_width(p)), row(padded(width)), n_ways(width - 4 * p.c) {
    allocate(args, this->near, [&](Arena& arena) {
      tile.place(arena, false);
      arena.take(lanes, n_ways + p.c), arena.take(rows, L * padded(n_ways + p.c));
      arena.take(sums, int64_t{p.n_types} * splines_per_type(p) * row);
    });
  }

  // Of a coefficient.
  int order_of(int k) const {
    if (p.kind == kPlanar) return p.order[k];
    for (int m = 0; m < p.d; ++m)
      if (p.coordinate[m] == k) return p.degree[m];
    return 0;
  }

  void add() {
    tile.enter_frame(true);
    Splines<R>& splines = tile.splines;
    const Edges<R>& e = tile.e;
    splines.locate(e);
    for (int m = 0; m < p.d; ++m) lanes[m] = e.first[m];
    for (int m = 0; m < p.d && p.kind == kPlanar; ++m) lanes[p.d + m] = e.second[m];
    const V squared = e.squared * e.scale * e.scale;
    for (int k = 0; k < p.c; ++k) {
      V power = V{} + 1;
      for (int n = 0; n < order_of(k); ++n) power *= squared;
      lanes[n_ways + k] = power;
    }
    const int64_t stride = padded(n_ways + p.c);
    lanes_to_rows<R>(static_cast<int>(n_ways + p.c), lanes, 1, [&](int l) { return rows + l * stride; }, tile.n_edges);
    for (int l = 0; l < tile.n_edges; ++l) add_edge(l, rows + l * stride);
  }

  void add_edge(int l, const R* values) {
    const Splines<R>& splines = tile.splines;
    constexpr int n = Splines<R>::kPieces;
    R* piece = sums + splines.first[l] / splines.row * row;
    for (int k = 0; k < n; ++k, piece += row) {
      const R weight = number(splines.pieces.weights[k], l);
      for (int64_t x = 0; x < n_ways; ++x) piece[x] += values[x] * weight;
      for (int q = 0; k + q < n; ++q) {
        const R both = weight * number(splines.pieces.weights[k + q], l);
        for (int c = 0; c < p.c; ++c) piece[n_ways + q * p.c + c] += values[n_ways + c] * both;
      }
    }
  }

  // out: [types · splines per type, width]
  void run(int64_t begin, int64_t end, R* out) {
    this->for_tiles(begin, end, [&] { add(); });
    const int64_t n = int64_t{p.n_types} * splines_per_type(p);
    for (int64_t k = 0; k < n; ++k, out += width) memcpy(out, sums + k * row, sizeof(R) * width);
  }
};

}  // namespace implicit_steer::IST_ISA
