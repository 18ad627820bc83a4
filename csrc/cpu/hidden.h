// Hidden features alone, for kernels on a grid: h_e = factor · (features of the last layer, 1), and their gradients.
#pragma once

#include "worker.h"

namespace implicit_steer::IST_ISA {

template <typename R>
struct Hidden : Worker<R> {
  using Base = Worker<R>;
  using V = typename Lane<R>::V;
  using Base::a, Base::p, Base::e, Base::mlp, Base::edge, Base::n_edges, Base::hidden, Base::d_hidden;
  static constexpr int L = Lane<R>::L;
  int channels, size;  // size: numbers of one h, its constant one included
  V *h, *d_h;          // [size]
  bool need_weights;

  Hidden(const ConvArgs<Real<R>>& args, const CouplingSizes& sizes, bool backward, int64_t own_edges)
      : Base(args, sizes, backward, own_edges, 2 * hidden_size(*args.plan)) {
    channels = p.hidden_flat / p.c, size = static_cast<int>(hidden_size(p));
    h = this->extra, d_h = h + size;
    need_weights = a.grad_weights;
    e.d_shell = V{};
  }

  // h without the factor; y: what the MLP gave, before the way back from the frame.
  const V* evaluate() {
    this->enter_frame(false);
    const V* y = mlp.hidden(e);
    if (p.kind == kPlanar) expand_forward(p, e, y, hidden);
    const V* flat = p.kind == kPlanar ? hidden : y;
    for (int w = 0; w < channels; ++w)
      for (int m = 0; m < p.d; ++m) {
        const V value = flat[w * p.c + p.coordinate[m]];
        h[w * p.d + m] = p.kind == kZonal ? value * e.first[m] : value;
      }
    h[size - 1] = V{} + 1;
    return y;
  }

  void forward(int64_t begin, int64_t end) {
    this->points(begin, end, [&] {
      evaluate();
      for (int k = 0; k < size; ++k) h[k] *= e.factor;
      this->store(h, size, a.out);
    });
  }

  void reverse() {
    const V* y = evaluate();
    const int64_t n = size;
    for (int k = 0; k < size; ++k) d_h[k] = V{};
    rows_to_lanes<Real<R>>(
        size, [&](int l) { return a.grad_out + edge[l] * n; },
        [&](int l, int at, int count) { return edge[l] * n + at + count <= a.n_edges * n; }, plane<R>(d_h, 0),
        kPlanes<R>);
    const auto inside = this->counting_lanes() > 0;
    e.d_factor = V{};
    for (int k = 0; k < size; ++k) {
      d_h[k] = select(inside, d_h[k], V{});
      e.d_factor += d_h[k] * h[k];
      d_h[k] *= e.factor;
    }
    for (int k = 0; k < p.hidden_flat; ++k) d_hidden[k] = V{};
    for (int w = 0; w < channels; ++w)
      for (int m = 0; m < p.d; ++m) {
        V& d = d_hidden[w * p.c + p.coordinate[m]];
        d += p.kind == kZonal ? d_h[w * p.d + m] * e.first[m] : d_h[w * p.d + m];
      }
    this->sweep_mlp(need_weights, true);
    for (int w = 0; w < channels && p.kind == kZonal; ++w)
      for (int m = 0; m < p.d; ++m) e.d_first[m] += d_h[w * p.d + m] * y[w * p.c + p.coordinate[m]];
    this->sweep_frame();
  }

  void backward(int64_t begin, int64_t end, Real<R>* grad_weights) {
    this->points(begin, end, [&] { reverse(); });
    if (!need_weights) return;
    memset(grad_weights, 0, sizeof(Real<R>) * p.n_grad);
    this->write_mlp_weights(grad_weights);
  }
};

}  // namespace implicit_steer::IST_ISA
