// Batch statistics of one hidden activation: sums and sums of squares of the full hidden field over all edges.
#pragma once

#include "points.h"

namespace implicit_steer::IST_ISA {

// Edges in their given order, whatever the graph's.
template <typename R>
struct Statistics : Points<R> {
  using Base = Points<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::tile;
  static constexpr int L = Lane<R>::L;
  static constexpr int kTiles = 32;  // whose sums are kept in R before they go to double
  int n_values;
  V *partial, *partial_squares, *shift;  // [channels * d]

  Statistics(const ConvArgs<R>& args, int n, int64_t own_points) : Base(args, own_points), n_values(n) {
    allocate(a, this->near, [&](Arena& arena) {
      tile.place(arena, false);
      arena.take(partial, n), arena.take(partial_squares, n), arena.take(shift, n);
    });
  }

  // Full hidden coordinate m of channel w from the activations y.
  V coordinate(const V* y, int w, int m) const {
    const Edges<R>& e = tile.e;
    if (p.kind == kZonal) return y[w * p.c + p.coordinate[m]] * e.first[m];
    if (p.kind == kPlanar) return turned(p, e.first, e.second, y + w * p.c, m);
    return y[w * p.c + m];
  }

  const V* evaluate() {
    tile.enter_frame(true);
    return tile.mlp.forward(tile.e, a.layer);
  }

  void add(const V* y) {
    const V inside = tile.counting_lanes();
    for (int w = 0, k = 0; k < n_values; ++w)
      for (int m = 0; m < p.d; ++m, ++k) {
        const V h = (coordinate(y, w, m) - shift[k]) * inside;
        partial[k] += h, partial_squares[k] += h * h;
      }
  }

  void flush(double* sums) {
    for (int k = 0; k < n_values; ++k) {
      double sum = 0, squares = 0;
      for (int l = 0; l < L; ++l) sum += partial[k][l], squares += partial_squares[k][l];
      sums[k] += sum, sums[n_values + k] += squares;
      partial[k] = partial_squares[k] = V{};
    }
  }

  // The values at edge 0 are subtracted: less cancellation in the variance.
  void run(int64_t begin, int64_t end, double* sums) {
    tile.load_points(0, a.n_edges);
    const V* first = evaluate();
    for (int w = 0, k = 0; k < n_values; ++w)
      for (int m = 0; m < p.d; ++m, ++k) {
        const R value = coordinate(first, w, m)[0];
        shift[k] = splat<V>(value);
        if (sums == a.sums) a.shift[k] = value;  // all blocks have the same one; the first writes it
        partial[k] = partial_squares[k] = V{}, sums[k] = sums[n_values + k] = 0;
      }
    int tiles = 0;
    this->for_tiles(begin, end, [&] {
      add(evaluate());
      if (++tiles % kTiles == 0) flush(sums);
    });
    flush(sums);
  }
};

}  // namespace implicit_steer::IST_ISA
