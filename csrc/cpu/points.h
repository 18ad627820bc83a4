// Points without neighbours, in their given order, tile by tile: the base of a block's work on them, Hidden and
// Statistics.
#pragma once

#include "edge_tile.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Points {
  const ConvArgs<Real<R>>& a;
  const PlanView<Real<R>>& p;
  EdgeTile<R> tile;
  NearList near;

  Points(const ConvArgs<Real<R>>& args, int64_t own_points)
      : a(args), p(*args.plan), tile(args), near(p.regular ? own_points : 0) {}

  // f() for every tile of the points begin .. end-1, which calls tile.enter_frame().
  template <typename F>
  void for_tiles(int64_t begin, int64_t end, F f) {
    for (int64_t at = begin; at < end; at += tile.L) {
      tile.load_points(at, end);
      f();
      if (tile.near_lanes) near.add(tile.near_lanes, tile.edge, 0, 0, tile.n_edges);
    }
    for (int64_t at = 0; at < near.size; at += tile.L) {
      tile.load_points(near, at);
      f();
    }
  }
};

}  // namespace implicit_steer::IST_ISA
