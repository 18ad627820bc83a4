// Hidden features alone, for kernels on a grid: h_e = factor · (features of the last layer, 1), and their gradients.
#pragma once

#include "points.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Hidden : Points<R> {
  using Base = Points<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::tile;
  const int channels, size;  // size: numbers of one h, its constant one included
  V *h, *d_h;                // [size]
  const bool need_weights;

  Hidden(const ConvArgs<Real<R>>& args, bool backward, int64_t own_points)
      : Base(args, own_points),
        channels(p.hidden_flat / p.c),
        size(static_cast<int>(hidden_size(p))),
        need_weights(a.grad_weights) {
    allocate(a, this->near, [&](Arena& arena) {
      tile.place(arena, backward);
      arena.take(h, size), arena.take(d_h, size);
    });
    tile.e.d_shell = V{};
  }

  // h without the factor
  void evaluate() {
    tile.evaluate();
    for (int w = 0; w < channels; ++w)
      for (int m = 0; m < p.d; ++m) {
        const V value = tile.features[w * p.c + p.coordinate[m]];
        h[w * p.d + m] = p.kind == kZonal ? value * tile.e.first[m] : value;
      }
    h[size - 1] = V{} + 1;
  }

  void forward(int64_t begin, int64_t end) {
    this->for_tiles(begin, end, [&] {
      evaluate();
      for (int k = 0; k < size; ++k) h[k] *= tile.e.factor;
      tile.store_rows(size, h, a.out);
    });
  }

  void reverse() {
    Edges<R>& e = tile.e;
    evaluate();
    for (int k = 0; k < size; ++k) d_h[k] = V{};
    tile.load_plane(size, a.grad_out, plane<R>(d_h, 0));
    const auto inside = tile.counting_lanes() > 0;
    e.d_factor = V{};
    for (int k = 0; k < size; ++k) {
      d_h[k] = select(inside, d_h[k], V{});
      e.d_factor += d_h[k] * h[k];
      d_h[k] *= e.factor;
    }
    for (int k = 0; k < p.hidden_flat; ++k) tile.d_hidden[k] = V{};
    for (int w = 0; w < channels; ++w)
      for (int m = 0; m < p.d; ++m) {
        V& d = tile.d_hidden[w * p.c + p.coordinate[m]];
        d += p.kind == kZonal ? d_h[w * p.d + m] * e.first[m] : d_h[w * p.d + m];
      }
    tile.sweep_hidden(need_weights, true);
    for (int w = 0; w < channels && p.kind == kZonal; ++w)
      for (int m = 0; m < p.d; ++m) e.d_first[m] += d_h[w * p.d + m] * tile.features[w * p.c + p.coordinate[m]];
    tile.sweep_frame();
  }

  void backward(int64_t begin, int64_t end, Real<R>* grad_weights) {
    this->for_tiles(begin, end, [&] { reverse(); });
    if (!need_weights) return;
    memset(grad_weights, 0, sizeof(Real<R>) * p.n_grad);
    tile.write_mlp_weights(grad_weights);
  }
};

}  // namespace implicit_steer::IST_ISA
