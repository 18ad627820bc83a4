// How much each of a table's splines counts among edges: Σ_e w_j(u_e) [1, first_e, second_e], from which batch
// statistics follow without the MLP's values on the edges.
#pragma once

#include "points.h"

namespace implicit_steer::IST_ISA {

// Numbers of a row of sums.
template <typename R>
int64_t table_sums_width(const PlanView<R>& p) {
  return 1 + p.d * (p.kind == kPlanar ? 2 : 1);
}

template <typename R>
struct TableSums : Points<R> {
  using Base = Points<R>;
  using V = typename Lane<R>::V;
  using Base::p, Base::tile;
  static constexpr int L = Lane<R>::L, QL = Lane<R>::QL;
  const int64_t width, row;
  V* lanes;        // [width] what is summed
  R *rows, *sums;  // [L, row] the same edge by edge; [types · splines per type, row]

  TableSums(const ConvArgs<R>& args, int64_t own_points)
      : Base(args, own_points), width(table_sums_width(p)), row(padded(width)) {
    allocate(args, this->near, [&](Arena& arena) {
      tile.place(arena, false);
      arena.take(lanes, width), arena.take(rows, L * row);
      arena.take(sums, int64_t{p.n_types} * splines_per_type(p) * row);
    });
  }

  void add() {
    tile.enter_frame(true);
    Splines<R>& splines = tile.splines;
    splines.locate(tile.e);
    lanes[0] = V{} + 1;
    for (int m = 0; m < p.d; ++m) lanes[1 + m] = tile.e.first[m];
    for (int m = 0; m < p.d && p.kind == kPlanar; ++m) lanes[1 + p.d + m] = tile.e.second[m];
    lanes_to_rows<R>(static_cast<int>(width), lanes, 1, [&](int l) { return rows + l * row; }, tile.n_edges);
    for (int l = 0; l < tile.n_edges; ++l) {
      R* piece = sums + splines.first[l] / splines.row * row;
      for (int k = 0; k < splines.kPieces; ++k, piece += row) {
        const R weight = number(splines.weights[k], l);
        for (int64_t x = 0; x < row; x += QL)
          store_row(piece + x, load_row(piece + x) + load_row(rows + l * row + x) * weight);
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
