// The four pieces of a table's cubic B-splines (plan/table.py) that count at u, their weights and the derivatives of
// these by u: of lanes on processors, of one edge on GPUs.
#pragma once

#include "edge_frame.h"

namespace implicit_steer::IST_ISA {

template <typename V>
struct SplinePieces {
  static constexpr int n = 4;
  V weights[n], slopes[n];
};

// Where u lies among the knots: the pieces that count are those from floor(position) on.
template <typename R, typename V>
IST_INLINE V spline_position(const PlanView<R>& p, V u) {
  return u * p.per_spacing + R(0.5);
}
// The first of them: the last one beyond the last knot, and where u is NaN.
template <typename R>
IST_INLINE int spline_cell(const PlanView<R>& p, R position) {
  return position < static_cast<R>(p.n_knots) ? static_cast<int>(position) : p.n_knots - 1;
}
// The row of attributes that an edge with this attribute has.
template <typename R>
IST_INLINE int spline_type(const PlanView<R>& p, R attribute) {
  return attribute > 0 ? (attribute < static_cast<R>(p.n_types) ? static_cast<int>(attribute) : p.n_types - 1) : 0;
}

// In the first cell of even splines the outer two of the coefficients are equal, and so are the inner two. Written in
// x = u / spacing, whose derivative by a position is x / u, their weights keep all digits at u = 0.
template <typename R, typename V, typename M>
IST_INLINE void set_first_cell(const PlanView<R>& p, V x, M there, SplinePieces<V>& pieces) {
  const V outer = (3 * x * x + R(0.25)) * (R(1) / 12), slope = x * (R(0.5) * p.per_spacing);
  IST_UNROLLED for (int k = 0; k < pieces.n; ++k) {
    const bool is_outer = k == 0 || k == 3;
    pieces.weights[k] = select(there, is_outer ? outer : R(0.5) - outer, pieces.weights[k]);
    pieces.slopes[k] = select(there, is_outer ? slope : -slope, pieces.slopes[k]);
  }
}

// `cell`: spline_cell() of the position.
template <typename R, typename V, typename C>
IST_INLINE SplinePieces<V> spline_pieces(const PlanView<R>& p, V u, V position, C cell) {
  const V inside = position - cell, t = lane_min(V{} + 1, inside), s = 1 - t;
  const R sixth = R(1) / 6, steep = R(0.5) * p.per_spacing;
  const V slope = select(inside > 1, V{}, V{} + steep);
  SplinePieces<V> pieces{
      {s * s * s * sixth, (4 - 3 * t * t * (2 - t)) * sixth, (4 - 3 * s * s * (2 - s)) * sixth, t * t * t * sixth},
      {-s * s * slope, (3 * t - 4) * t * slope, (4 - 3 * s) * s * slope, t * t * slope}};
  if (p.even) set_first_cell(p, u * p.per_spacing, position < 1, pieces);
  return pieces;
}

}  // namespace implicit_steer::IST_ISA
